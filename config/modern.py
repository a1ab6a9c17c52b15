"""All three, which is StarCoder2's architecture. An overlay: python train.py config/shakespeare.py config/modern.py"""
use_rope = True
use_gqa = True
n_kv_head = 2      # must divide n_head
use_swa = True
window_size = 32   # short, to act in the small configs too; a quarter of block_size is a fair start for long texts
