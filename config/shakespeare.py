"""Tiny Shakespeare, one token per character: a model that fits the machine it runs on."""
import torch

out_dir = "out-shakespeare"
dataset = "shakespeare"
bias = False
beta2 = 0.99               # few tokens per step: average squared gradients over more steps

if torch.cuda.is_available():   # nanoGPT's recipe for a GPU
    n_layer = 6
    n_head = 6
    n_embd = 384
    block_size = 256
    batch_size = 64
    micro_batch_size = 64
    dropout = 0.2          # the text is small for a model of this size, which would overfit
    max_iters = 5000
    learning_rate = 1e-3
    warmup_iters = 100
    eval_interval = 250
    eval_iters = 7         # 64 * 7 sequences: the whole validation split
    log_interval = 100
else:                      # wide rather than deep: fewer, larger matrix products
    n_layer = 2
    n_head = 4
    n_embd = 192
    block_size = 64
    batch_size = 24
    micro_batch_size = 24
    max_iters = 250
    optimizer = "muon"     # more time per step than AdamW, but far fewer steps
    learning_rate = 1.5e-2
    warmup_iters = 40
    eval_interval = 125
    eval_iters = 73        # 24 * 73 sequences: the whole validation split
    log_interval = 25
