"""
GPT-2 medium, 355M parameters. What is not set here is as in gpt2.py.
torchrun --standalone --nproc_per_node=8 train.py config/gpt2_medium.py
"""
out_dir = "out-gpt2-medium"

n_layer = 24
n_head = 16
n_embd = 1024

batch_size = 512         # half a million tokens, as in the GPT-3 paper for this size (table 2.1)
micro_batch_size = 8
max_iters = 19073        # 10 billion tokens
learning_rate = 3e-4     # the same table
warmup_iters = 700
