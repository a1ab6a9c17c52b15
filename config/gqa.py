"""
Two key/value heads, shared by all query heads. An overlay:
python train.py config/shakespeare.py config/gqa.py
"""
use_gqa = True
n_kv_head = 2      # must divide n_head
