"""Tiny Shakespeare, one token a character: a model that fits the machine it runs on."""
import torch

from launch import bf16_speed

out_dir = "out-shakespeare"
dataset = "shakespeare"

if torch.cuda.is_available():   # nanoGPT's recipe for a GPU
    n_layer, n_head, n_embd, block_size = 6, 6, 384, 256
    batch_size = micro_batch_size = 64
    dropout = 0.2               # a model of this size soon learns a text of a million characters by heart
    max_iters = 5000
    learning_rate = 1e-3
    warmup_iters = 100
    eval_interval = 250
else:                           # wide rather than deep: fewer, larger matrix products
    n_layer, n_head, n_embd, block_size = 2, 4, 192, 64
    if bf16_speed() > 0.3:      # under half a minute on two cores
        optimizer = "muon"      # 40% more time a step than AdamW, and less than half the tokens; AdamW needs a smaller learning_rate
        batch_size = micro_batch_size = 24
        max_iters = 250
        learning_rate = 1.5e-2
        warmup_iters = 40
    else:                       # Muon multiplies in bfloat16, and this CPU has no instructions for it: about a minute
        batch_size = micro_batch_size = 12
        max_iters = 1800
        learning_rate = 3e-3
        warmup_iters = 100
    eval_interval = max_iters // 2

bias = False
beta2 = 0.99                    # few tokens a step: a longer memory for the squared gradients
eval_iters = 1000               # the whole validation split
log_interval = max(1, max_iters // 10)
