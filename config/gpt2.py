"""
GPT-2 124M from scratch on 10 billion tokens of FineWeb. These are the defaults, written out.
Expected validation loss: about 3.29, as llm.c reports for this model and data.
"""
out_dir = "out"
dataset = "fineweb"      # 100 shards, 20 GB, downloaded when missing

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024

batch_size = 512         # 524,288 tokens per step, near the GPT-3 paper's half million (table 2.1)
micro_batch_size = 16    # fits 24 GB; with more memory, any larger divisor of batch_size
max_iters = 19073        # 10 billion tokens
learning_rate = 6e-4     # GPT-3 paper, table 2.1
warmup_iters = 700       # 367 million tokens; GPT-3 took 375 million
weight_decay = 0.1
