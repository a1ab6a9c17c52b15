"""The source code of Python's own library, one token per character: needs no network."""
import torch

out_dir = "out-stdlib"
dataset = "stdlib"
bias = False
beta2 = 0.99               # few tokens per step: average squared gradients over more steps
eval_iters = 20            # a part of the large validation split is enough

if torch.cuda.is_available():
    n_layer = 6
    n_head = 6
    n_embd = 384
    block_size = 256
    batch_size = 64
    micro_batch_size = 64
    max_iters = 5000
    learning_rate = 1e-3
    warmup_iters = 100
    eval_interval = 1000
    log_interval = 500
else:                      # as config/shakespeare.py, with twice the context and twice the steps
    n_layer = 2
    n_head = 4
    n_embd = 192
    block_size = 128
    batch_size = 24
    micro_batch_size = 24
    max_iters = 500
    optimizer = "muon"
    learning_rate = 1.5e-2
    warmup_iters = 40
    eval_interval = 100
    log_interval = 50
