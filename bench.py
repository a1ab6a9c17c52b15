"""
What attention in blocks and the KV cache cost and save, measured on this machine.

  python bench.py attention    time and memory of full, masked and blocked attention against the length of the text
  python bench.py decode       tokens/s of generation, GPT-2 124M, beside transformers (if it is installed); a step after 400 and
                               after 4,000 tokens with RoPE and a window
  python bench.py endless      100,000 tokens from one model with RoPE and a window: speed and memory as it goes

Everything that is compared is measured in one run, in turn; times are medians, with the smallest and largest beside them.
"""

import argparse
import multiprocessing
import statistics
import time

import torch

from model import GPT, GPTConfig, attend, attend_in_blocks, visible


def times(*functions, repeat=5):
    """Seconds of each function, in turn, so that a drift of the machine meets all -> a list of lists"""
    taken = [[] for _ in functions]
    for _ in range(repeat):
        for f, seconds in zip(functions, taken):
            f()   # does not count: what ran before has left caches and memory as it needed them
            start = time.perf_counter()
            f()
            seconds.append(time.perf_counter() - start)
    return taken


def ms(seconds):
    return f"{1e3 * statistics.median(seconds):8.1f} ms ({1e3 * min(seconds):.1f} to {1e3 * max(seconds):.1f})"


def peak_mb(reset=False):
    """The most memory this process has held, in MB; with reset what it holds now, from where the peak is counted anew."""
    try:   # Linux; elsewhere no memory figures
        if reset:
            with open("/proc/self/clear_refs", "w") as f:
                f.write("5")
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) / 1024 for line in f if line.startswith("VmRSS:" if reset else "VmHWM:"))
    except OSError:
        return float("nan")


def masked(q, k, v, W):
    pos = torch.arange(q.shape[2])
    return attend(q, k, v, visible(pos, pos, W))


FORMS = dict(full=lambda q, k, v, W: attend(q, k, v), masked=masked, blocks=attend_in_blocks)


def qkv(T, H=12, D=64):
    return torch.randn(1, T, 3 * H, D).transpose(1, 2)   # as c_attn leaves them: heads side by side


def backward_memory(args):
    """Peak memory of forward and backward, in a process of its own: (form, T, W) -> MB above what stood before"""
    form, T, W = args
    heads = qkv(T).requires_grad_()
    before = peak_mb(reset=True)
    q, k, v = heads.split(12, dim=1)
    FORMS[form](q, k, v, W).sum().backward()
    return peak_mb() - before


def attention(W=256):
    print(f"12 heads of 64, W = {W}, float32, forward; memory: forward and backward")
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for T in (1024, 2048, 4096, 8192, 16384):
            forms = {name: f for name, f in FORMS.items() if T < 16384 or name != "masked"}   # whose mask alone is 1 GB there
            memory = pool.map(backward_memory, [(form, T, W) for form in forms], chunksize=1)
            with torch.no_grad():
                q, k, v = qkv(T).split(12, dim=1)
                taken = times(*(lambda form=form: form(q, k, v, W) for form in forms.values()), repeat=25 if T < 8192 else 5)
            for form, seconds, mb in zip(forms, taken, memory):
                ratio = statistics.median(taken[0]) / statistics.median(seconds)
                print(f"T {T:6}  {form:6} {ms(seconds):40} {ratio:5.1f} times as fast as full   {mb:6.0f} MB", flush=True)


@torch.no_grad()
def decode(new=256):
    torch.manual_seed(0)
    idx = torch.randint(50257, (1, 16))
    ours = GPT(GPTConfig()).eval()
    runs = {"plainGPT": lambda: ours.generate(idx, new, temperature=0)}
    try:
        import transformers
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
        runs[f"transformers {transformers.__version__}"] = lambda: theirs.generate(
            idx, attention_mask=torch.ones_like(idx), max_new_tokens=new, min_new_tokens=new, do_sample=False)
    except ImportError:
        print("transformers is not installed: no comparison")
    print(f"GPT-2 124M, float32, greedy, a prompt of 16 tokens, {new} new ones")
    taken = times(*runs.values(), repeat=3)
    for name, seconds in zip(runs, taken):
        print(f"  {name:22} {new / statistics.median(seconds):6.1f} tokens/s ({new / max(seconds):.1f} to {new / min(seconds):.1f})")

    config = GPTConfig(use_rope=True, use_swa=True, window_size=256)
    model, token = GPT(config).eval(), torch.randint(50257, (1, 1))
    print("one more token, RoPE and W = 256, in turn")
    caches = {}
    for length in (400, 4000):
        caches[length] = model.new_cache(1)
        for chunk in torch.randint(50257, (1, length)).split(500, dim=1):
            model.hidden(chunk, caches[length])
    steps = times(*(lambda cache=cache: model(token, cache=cache) for cache in caches.values()), repeat=100)
    for length, seconds in zip(caches, steps):
        print(f"  after {length:5} tokens {ms(seconds)}")


def endless(n=100_000):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=256, vocab_size=256, n_layer=4, n_head=4, n_embd=128, use_rope=True, use_swa=True, window_size=64)).eval()
    start = time.perf_counter()
    for i, _ in enumerate(model.stream(torch.zeros(1, 1, dtype=torch.long), n), 1):
        if i in (1000, n // 10) or i % (n // 4) == 0:
            print(f"{i:8,} tokens, {i / (time.perf_counter() - start):6.0f} tokens/s, peak memory {peak_mb():.1f} MB", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("attention", "decode", "endless"))
    what = parser.parse_args().what
    print(f"torch {torch.__version__}, cpu, {torch.get_num_threads()} threads")
    {"attention": attention, "decode": decode, "endless": endless}[what]()
