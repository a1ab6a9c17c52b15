"""
GPT-2 XL, 1558M parameters. What is not set here is as in gpt2.py.
torchrun --standalone --nproc_per_node=8 train.py config/gpt2_xl.py --fsdp
"""
out_dir = "out-gpt2-xl"

n_layer = 48
n_head = 25
n_embd = 1600

batch_size = 1024        # a million tokens, as in the GPT-3 paper for this size (table 2.1)
micro_batch_size = 8
max_iters = 9537         # 10 billion tokens
learning_rate = 2e-4     # the same table
warmup_iters = 350
# On GPUs with less than 80 GB: checkpoint_activations = True, or a smaller micro_batch_size
