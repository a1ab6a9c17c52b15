"""The Python standard library that is already on this machine, one token a character: needs no network."""
import torch

out_dir = "out-stdlib"
dataset = "stdlib"

if torch.cuda.is_available():
    n_layer, n_head, n_embd, block_size = 6, 6, 384, 256
    batch_size = micro_batch_size = 64
    max_iters = 5000
    learning_rate = 1e-3
else:                           # about a minute on two cores of a CPU
    n_layer, n_head, n_embd, block_size = 2, 4, 192, 128   # as config/shakespeare.py, with a longer view
    batch_size = micro_batch_size = 24
    max_iters = 500
    optimizer = "muon"
    learning_rate = 1.5e-2

bias = False
beta2 = 0.99
warmup_iters = 40
eval_interval = max_iters // 5
eval_iters = 20                 # of a large split a part is enough
log_interval = 50
