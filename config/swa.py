"""
Each token sees itself and the 31 before it. An overlay:
python train.py config/shakespeare.py config/swa.py
"""
use_swa = True
window_size = 32   # short, to matter in the small configs too; for long texts try block_size / 4
