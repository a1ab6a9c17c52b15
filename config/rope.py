"""
Rotary positions instead of learned ones. An overlay:
python train.py config/shakespeare.py config/rope.py
"""
use_rope = True
