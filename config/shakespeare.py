"""Tiny Shakespeare, one token a character: a model that fits the machine it runs on."""
import torch

out_dir = "out-shakespeare"
dataset = "shakespeare"

if torch.cuda.is_available():   # nanoGPT's recipe for a GPU
    n_layer, n_head, n_embd, block_size = 6, 6, 384, 256
    batch_size = micro_batch_size = 64
    dropout = 0.2               # a model of this size soon learns a text of a million characters by heart
    max_iters = 5000
    learning_rate = 1e-3
else:                           # under half a minute on two cores of a CPU
    n_layer, n_head, n_embd, block_size = 2, 4, 192, 64   # wide rather than deep: fewer, larger matrix products
    batch_size = micro_batch_size = 24
    max_iters = 250
    optimizer = "muon"          # a third more time a step than AdamW, and less than half the steps
    learning_rate = 1.5e-2

bias = False
beta2 = 0.99                    # few tokens a step: a longer memory for the squared gradients
warmup_iters = 40
eval_interval = max_iters // 2
eval_iters = 1000               # the whole validation split
log_interval = 25
