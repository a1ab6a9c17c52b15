"""
All three, which is the architecture of StarCoder2. An overlay:
python train.py config/shakespeare.py config/modern.py
"""
use_rope = True
use_gqa = True
n_kv_head = 2      # must divide n_head
use_swa = True
window_size = 32   # short, to matter in the small configs too; for long texts try block_size / 4
