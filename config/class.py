"""
A small model whose losses a class can compare: the same on every machine with the same version of
torch, up to rounding. AdamW, float32 and fixed sizes; on the CPU, so that a GPU does not change the
digits. lessons/1_gpt2.md says what to expect. python train.py config/class.py
"""
out_dir = "out-class"
dataset = "shakespeare"
device = "cpu"
dtype = "float32"
compile = False

n_layer = 2
n_head = 4
n_embd = 128
block_size = 64
bias = True

batch_size = 32
micro_batch_size = 32
max_iters = 200
optimizer = "adamw"
learning_rate = 6e-3
warmup_iters = 20
eval_interval = 50
eval_iters = 20
log_interval = 20
seed = 1337
