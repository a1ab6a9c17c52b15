"""
What attention in blocks and the KV cache cost and save, measured on this machine.

  python bench.py attention    time and memory of full, masked and blocked attention against the length of the text
  python bench.py decode       tokens/s of generation, GPT-2 124M, beside transformers (if it is installed); a step after 400 and
                               after 4,000 tokens with RoPE and a window
  python bench.py endless      100,000 tokens from one model with RoPE and a window: speed and memory as it goes
  python bench.py processes    train.py alone, as DDP and as FSDP: tokens/s of two processes with half the threads each, and what each holds

Everything that is compared is measured in one run, in turn; times are medians, with the smallest and largest beside them.
"""

import argparse
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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


# Run by torchrun in place of train.py: the same, and rank 0 also prints the bytes it holds at a checkpoint.
HELD = """
import torch, train

def size(tensors):
    tensors = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in tensors) / 1e6

def clip_and_note(params, norm):
    params = list(params)
    held["gradients"] = size(p.grad for p in params)
    return clip(params, norm)

def save_and_note(path, model, optimizers, *rest):
    held["averages"] = size(t for optimizer in optimizers for state in optimizer.state.values() for t in state.values())
    print(f"held: {size(model.parameters()):.0f} MB of parameters,", ", ".join(f"{n:.0f} of {name}" for name, n in held.items()))

held, clip, save = {}, torch.nn.utils.clip_grad_norm_, train.save
torch.nn.utils.clip_grad_norm_, train.save = clip_and_note, save_and_note
train.GPT.from_pretrained = lambda path: train.GPT(train.GPTConfig(8, 8, 1, 1, 8))   # nothing was saved; no sample at the end
train.GPT.generate = lambda self, idx, *args, **options: idx
train.run(train.main)
"""


def processes():
    here, threads = Path(__file__).parent.resolve(), torch.get_num_threads()
    models = {"config/shakespeare.py": ["config/shakespeare.py", "--device=cpu", "--max_iters=300", "--log_interval=150"],
              "GPT-2 124M, 8 x 256 tokens": ["--block_size=256", "--vocab_size=50304", "--batch_size=8", "--micro_batch_size=2",
                                             "--warmup_iters=0", "--dtype=float32", "--device=cpu", "--max_iters=2", "--log_interval=1"]}
    modes = {"alone": (1, []), "DDP": (2, []), "FSDP": (2, ["--fsdp"])}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("config", "train.py"):
            os.symlink(here / name, Path(folder, name))
        Path(folder, "held.py").write_text(HELD)
        Path(folder, "text.txt").write_text("".join(p.read_text(encoding="utf-8") for p in here.glob("*.py")), encoding="utf-8")
        env = os.environ | {"PYTHONPATH": str(here)}
        subprocess.run([sys.executable, here / "prepare_data.py", "--input", "text.txt", "--name", "text"], cwd=folder, env=env, check=True, capture_output=True)
        for name, flags in models.items():
            speeds, held = {mode: [] for mode in modes}, {}
            for _ in range(3):
                for mode, (n, more) in modes.items():
                    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", "held.py", *flags, *more,
                               "--dataset=text", "--eval_interval=1000000", "--eval_iters=1", "--checkpoint_interval=1000000"]
                    out = subprocess.run([sys.executable, *command], cwd=folder, env=env | {"OMP_NUM_THREADS": str(max(1, threads // n))},
                                         check=True, capture_output=True, text=True, encoding="utf-8").stdout
                    speeds[mode].append(float(re.findall(r"([\d,]+) tokens/s", out)[-1].replace(",", "")))
                    held[mode] = re.findall("held: .*", out)[-1]
            print(name)
            for mode, (n, _) in modes.items():
                ratio = statistics.median(speeds[mode]) / statistics.median(speeds["alone"])
                print(f"  {mode:6}{n} x {max(1, threads // n)} thread(s)  {statistics.median(speeds[mode]):8,.0f} tokens/s ({min(speeds[mode]):,.0f} to "
                      f"{max(speeds[mode]):,.0f})  {ratio:.2f} of alone; {held[mode]}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("attention", "decode", "endless", "processes"))
    what = parser.parse_args().what
    print(f"torch {torch.__version__}, cpu, {torch.get_num_threads()} threads")
    {"attention": attention, "decode": decode, "endless": endless, "processes": processes}[what]()
