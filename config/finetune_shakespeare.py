"""Fine-tune the released GPT-2 124M on tiny Shakespeare: a few steps at a small learning rate."""
out_dir = "out-finetune-shakespeare"
init_from = "gpt2"       # or gpt2-medium, gpt2-large, gpt2-xl
dataset = "shakespeare_bpe"

batch_size = 32          # sequences of 256 tokens: 37 steps are one epoch of its 301,966 tokens
micro_batch_size = 4
block_size = 256
dropout = 0.1            # the text is small: without dropout the model soon overfits
max_iters = 40
learning_rate = 3e-5
min_lr = 3e-5
warmup_iters = 0
eval_interval = 5
log_interval = 1
