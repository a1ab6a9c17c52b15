"""The Python standard library that is already on this machine, one token a character: needs no network."""
import torch

from launch import bf16_speed

out_dir = "out-stdlib"
dataset = "stdlib"

if torch.cuda.is_available():
    n_layer, n_head, n_embd, block_size = 6, 6, 384, 256
    batch_size = micro_batch_size = 64
    max_iters = 5000
    learning_rate = 1e-3
    warmup_iters = 100
else:                           # as config/shakespeare.py, with a longer view: one to two minutes on two cores
    n_layer, n_head, n_embd, block_size = 2, 4, 192, 128
    if bf16_speed() > 0.3:
        optimizer = "muon"
        batch_size = micro_batch_size = 24
        max_iters = 500
        learning_rate = 1.5e-2
        warmup_iters = 40
    else:
        batch_size = micro_batch_size = 12
        max_iters = 2000
        learning_rate = 3e-3
        warmup_iters = 100

bias = False
beta2 = 0.99
eval_interval = max_iters // 5
eval_iters = 20                 # of a large split a part is enough
log_interval = max_iters // 10
