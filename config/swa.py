"""Each token sees itself and the 31 before it. An overlay: python train.py config/shakespeare.py config/swa.py"""
use_swa = True
window_size = 32   # short, to act in the small configs too; a quarter of block_size is a fair start for long texts
