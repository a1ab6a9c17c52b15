"""
What each variant costs and what it buys, and how fast all of it is, measured on this machine.

  python bench.py             size, compute, memory and speed of gpt2, rope, gqa, swa and modern (all three): README, "The assessment";
                              config files that follow add the model they describe: python bench.py config/gqa.py
                              --csv writes assets/variants.csv, --plot draws it
  python bench.py papers      what the papers claim, in miniature: short trainings of train.py, into assets/papers.csv; or one part
                              of it: python bench.py papers rope (gqa, windows, recall, longer, time)
  python bench.py plots       draws assets/*.png anew from assets/*.csv, and prints the means of papers.csv

  python bench.py attention   time and memory of full, masked and blocked attention against the length of the text (part of the first)
  python bench.py steps       a training step beside nanoGPT's (--nanogpt=FOLDER, a clone of it), and of long texts beside full attention
  python bench.py start       from the command to the first step, and to the loss nanoGPT's recipe ends with (--nanogpt=FOLDER)
  python bench.py decode      tokens/s of generation beside transformers (if it is installed), and with fewer key/value heads
  python bench.py endless     100,000 tokens from one model with RoPE and a window: speed and memory as it goes
  python bench.py processes   train.py alone, as DDP and as FSDP: tokens/s of two processes with half the threads each, and what each holds

Everything that is compared is measured in one run, in turn, after a warm-up; figures are medians, with the smallest and largest.
"""

import argparse
import csv
import ctypes
import importlib.util
import multiprocessing
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

import launch
import train
import weights
from launch import choose_device
from model import GPT, GPTConfig, InputError, attend, attend_in_blocks, visible
from prepare_data import Data, load_meta, prepare_text
from sample import compile_products

HERE = Path(__file__).parent.resolve()


# ----------------------------------------------------------------------------------------------------------------------
# Measuring

def seconds_of(f):
    """How long f() takes; on a GPU from when it begins to work on it to when it has ended"""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        f()
        return time.perf_counter() - start
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    f()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def times(*functions, repeat=5):
    """Seconds of each function, in turn, so that a drift of the machine meets all -> a list of lists"""
    taken = [[] for _ in functions]
    for _ in range(repeat):
        for f, seconds in zip(functions, taken):
            f()   # does not count: what ran before has left caches and memory as it needed them
            seconds.append(seconds_of(f))
    return taken


def ms(seconds):
    return f"{1e3 * statistics.median(seconds):8.1f} ms ({1e3 * min(seconds):.1f} to {1e3 * max(seconds):.1f})"


def peak_mb(reset=False):
    """The most memory held, in MB (10^6 bytes), of the GPU if there is one; with reset what is held now, from where the peak is counted anew"""
    if torch.cuda.is_available():
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return (torch.cuda.memory_allocated() if reset else torch.cuda.max_memory_allocated()) / 1e6
    try:   # Linux; elsewhere no memory figures
        if reset:
            ctypes.CDLL(None).malloc_trim(0)   # what was freed goes back to the system: used again, it counts again
            with open("/proc/self/clear_refs", "w") as f:
                f.write("5")
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) * 1024 / 1e6 for line in f if line.startswith("VmRSS:" if reset else "VmHWM:"))
    except (OSError, AttributeError, TypeError, StopIteration):
        return float("nan")


def as_worker():
    """Ctrl-C is for the process that started this one; and train.py must not answer that one's SIGTERM by finishing its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal = lambda *args: signal.SIG_DFL


def workers(n, **options):
    """n processes beside this one"""
    return multiprocessing.get_context("spawn").Pool(n, as_worker, **options)


def added_mb(make, *jobs):
    """The most memory that make(*job)() holds on top of what is held before it, in MB, for each job in a process of its own"""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)   # glibc: what a tensor frees goes back to the system, or it would count as held
    with workers(1, maxtasksperchild=1) as pool:
        return pool.starmap(_added_mb, [(make, *job) for job in jobs], chunksize=1)


def _added_mb(make, *job):
    f = make(*job)
    before = peak_mb(reset=True)
    f()
    return peak_mb() - before


def machine():
    """-> device, whether bfloat16 is faster there, a line that says so. Apple GPUs are left out: their times need another clock."""
    return choose_device("cuda" if torch.cuda.is_available() else "cpu", "auto")


def training_step(model, B, T, device, bf16, theirs=False):
    """-> a function that does one step as train.py does without compiling, on random tokens. theirs: as nanoGPT does on this device"""
    model.to(device).train()
    torch.set_float32_matmul_precision("high")
    optimizers = [model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)] if theirs else train.make_optimizers(model, train.TrainConfig(), device)
    bf16 = bf16 and (device.type == "cuda" or not theirs)   # on a CPU nanoGPT computes in float32
    x, y = (torch.randint(model.config.vocab_size, (B, T), device=device) for _ in range(2))

    def step():
        torch.backends.cuda.enable_flash_sdp(theirs or not (bf16 and device.type == "cpu" and T < 256))
        with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
            loss = model(x, y)[1]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in optimizers:
            o.step()
        model.zero_grad(set_to_none=True)
    return step


def later_step(config, T, device, bf16):
    """A training step of one sequence after the first one, which makes the optimizer's averages"""
    step = training_step(GPT(config), 1, T, device, bf16)
    step()
    return step


# ----------------------------------------------------------------------------------------------------------------------
# What each variant costs

WINDOW = 256
ROPE, GQA, SWA = dict(use_rope=True), dict(use_gqa=True, n_kv_head=4), dict(use_swa=True, window_size=WINDOW)
VARIANTS = dict(gpt2={}, rope=ROPE, gqa=GQA, swa=SWA, modern=ROPE | GQA | SWA)


def cache_bytes(config, n, itemsize=4):
    """What the cache of n tokens takes: key and value of every token that is kept, in every layer"""
    kept = sum(min(n, W) if W else n for W in config.windows)
    return 2 * kept * (config.n_kv_head or config.n_head) * (config.n_embd // config.n_head) * itemsize


def fill(model, n, B=1):
    """A cache as after n tokens; which they were does not matter for time and memory: keys and values at random"""
    cache, c, device = model.new_cache(B), model.config, next(model.parameters()).device
    for pos in torch.arange(n, device=device).split(512):
        for layer in cache.layers:
            layer.update(*torch.randn(2, B, c.n_kv_head or c.n_head, len(pos), c.n_embd // c.n_head, device=device), pos)
    held = sum(t.numel() * t.element_size() for layer in cache.layers for kv in (layer.k, layer.v)
               for t in [kv[:, :, :min(n, kv.shape[2])]])
    assert held == B * cache_bytes(model.config, n), "the formula is wrong"
    return cache


def table(title, columns, rows):
    print(f"\n{title}\n\n| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |")


def variants(files, write_csv):
    device, bf16, line = machine()
    print(line)
    configs = {name: GPTConfig(**switches) for name, switches in VARIANTS.items()}
    given = {f: train.load_config([f])[1] for f in files}
    rows, records = {}, []
    for name, config in (configs | given).items():
        with torch.device("meta"):
            model = GPT(config)
        cells = [f"{model.num_params() / 1e6:.2f}M"]
        cells += [f"{model.flops_per_token(T) / 1e6:,.0f}M" for T in (1024, 16384)]
        rows[name] = [*cells, f"{cache_bytes(config, 1):,}", *(f"{cache_bytes(config, n) / 1e6:.1f} MB" for n in (1024, 16384))]
    table("GPT-2 124M, by formula (tests hold parameters and FLOPs to be exact; cache in float32, batch 1)",
          ["parameters", "training FLOPs a token, T = 1,024", "T = 16,384", "cache bytes a token", "cache of 1,024 tokens", "of 16,384"], rows)

    gpu = device.type == "cuda"
    T, contexts = (4096, (256, 1024, 4096, 16384, 32768)) if gpu else (2048, (256, 1024, 4096))
    shape = {} if gpu else dict(n_layer=4, vocab_size=4096)   # GPT-2's own blocks, four of them, and fewer tokens to choose from
    def small(windows):
        return windows[:shape["n_layer"]] if shape and isinstance(windows, tuple) else windows
    configs = {name: replace(config, **shape, block_size=max(contexts) + 64, window_size=small(config.window_size))
               for name, config in (configs | given).items()}
    models = {name: GPT(config) for name, config in configs.items()}
    steps = {name: training_step(model, 1, T, device, bf16) for name, model in models.items()}
    measured = {("step", T): dict(zip(models, times(*steps.values(), repeat=5)))}
    memory = added_mb(later_step, *((config, T, device, bf16) for config in configs.values()))
    measured["memory", T] = {name: [mb] for name, mb in zip(configs, memory)}
    for model in models.values():
        model.eval()
    torch.backends.cuda.enable_flash_sdp(True)
    with torch.no_grad():
        for n in contexts:
            idx = torch.randint(64, (1, n), device=device)
            measured["prefill", n] = dict(zip(models, times(*(lambda m=m: m.hidden(idx, m.new_cache(1)) for m in models.values()), repeat=3)))
            for B in (1, 8) if n == 4096 else (1,):
                caches, token = {name: fill(model, n, B) for name, model in models.items()}, torch.zeros(B, 1, dtype=torch.long, device=device)
                taken = times(*(lambda name=name: models[name](token, cache=caches[name]) for name in models), repeat=25)
                measured["decode" if B == 1 else "decode 8", n] = dict(zip(models, taken))
    base = "gpt2"
    rows = {False: {name: [] for name in models}, True: {name: [] for name in models}}   # reading, and decoding
    columns = {False: [], True: []}
    for (what, n), taken in measured.items():
        decoding = what.startswith("decode")
        columns[decoding].append({"step": f"training, T = {n:,}", "memory": "memory of a step", "prefill": f"prompt of {n:,}",
                                  "decode": f"decoding after {n:,}", "decode 8": f"after {n:,}, batch 8"}[what])
        tokens = {"step": T, "prefill": n, "decode": 1, "decode 8": 8, "memory": None}[what]
        for name, values in taken.items():
            mid, ratio = statistics.median(values), statistics.median(taken[base]) / max(statistics.median(values), 1e-9)
            if tokens:
                rows[decoding][name].append(f"{ratio:.2f}: {tokens / mid:,.0f} ({tokens / max(values):,.0f} to {tokens / min(values):,.0f})")
            else:
                rows[decoding][name].append(f"{1 / max(ratio, 1e-9):.2f}: {mid:,.0f} MB")
            records.append((what, name, n, mid, min(values), max(values)))
    for decoding in (False, True):
        table(f"ratio to gpt2: tokens/s (smallest to largest), {'GPT-2 124M' if gpu else 'four blocks of GPT-2, vocabulary 4,096'}; training in "
              f"{'bfloat16' if bf16 else 'float32'}, batch 1, the rest in float32; memory above parameters and optimizer", columns[decoding], rows[decoding])
    records += attention()
    if write_csv:
        (HERE / "assets").mkdir(exist_ok=True)
        with open(HERE / "assets" / "variants.csv", "w", encoding="utf-8") as f:
            print(f"# torch {torch.__version__}, {line}; seconds and, for memory, MB", file=f)
            print("what,variant,T,median,low,high", file=f)
            for *key, mid, low, high in records:
                print(*key, f"{mid:.6g}", f"{low:.6g}", f"{high:.6g}", sep=",", file=f)


# Attention by itself

def masked(q, k, v, W):
    pos = torch.arange(q.shape[2], device=q.device)
    return attend(q, k, v, visible(pos, pos, W))


FORMS = dict(full=lambda q, k, v, W: attend(q, k, v), masked=masked, blocks=attend_in_blocks)


def qkv(T, H=12, D=64):
    return torch.randn(1, T, 3 * H, D, device="cuda" if torch.cuda.is_available() else "cpu").transpose(1, 2)   # as c_attn leaves them


def there_and_back(form, T):
    """-> a function that does forward and backward, as training does"""
    heads = qkv(T).requires_grad_()
    return lambda: FORMS[form](*heads.split(12, dim=1), WINDOW).sum().backward()


def attention():
    """Time and memory of full, masked and blocked attention against the length of the text -> records"""
    records, rows = [], {}
    for T in (1024, 2048, 4096, 8192, 16384):
        forms = {name: f for name, f in FORMS.items() if T < 16384 or name != "masked"}   # whose mask alone is 1 GB there, in float32
        memory = added_mb(there_and_back, *((form, T) for form in forms))
        repeat, heads = 9 if T < 4096 else 3 if T < 8192 else 2, qkv(T)
        with torch.no_grad():
            forward = times(*(lambda form=form: FORMS[form](*heads.split(12, dim=1), WINDOW) for form in forms), repeat=repeat)
        both = times(*(there_and_back(form, T) for form in forms), repeat=repeat)
        cells = {form: [f"{1e3 * statistics.median(f):,.0f}, {ms(t).strip()}, {mb:.0f} MB"] for form, f, t, mb in zip(forms, forward, both, memory)}
        faster = [f"{statistics.median(taken[0]) / statistics.median(taken[-1]):.1f}" for taken in (forward, both)]
        rows[f"{T:,}"] = [*(cells.get(form, ["-"])[0] for form in FORMS), ", ".join(faster)]
        for form, f, t, mb in zip(forms, forward, both, memory):
            records.append(("attention forward", form, T, statistics.median(f), min(f), max(f)))
            records.append(("attention", form, T, statistics.median(t), min(t), max(t)))
            records.append(("attention memory", form, T, mb, mb, mb))
    table(f"Attention, 12 heads of 64, W = {WINDOW}, float32: ms forward, ms forward and backward, memory of both",
          ["full", "masked", "in blocks", "full / blocks"], rows)
    return records


# ----------------------------------------------------------------------------------------------------------------------
# How fast

def theirs(folder):
    """nanoGPT's model.py as a module, from a clone of its repository"""
    spec = importlib.util.spec_from_file_location("nanogpt", Path(folder) / "model.py")
    module = sys.modules["nanogpt"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def steps(nanogpt):
    device, bf16, line = machine()
    print(line)
    shapes = {"nanoGPT's CPU recipe, 12 x 64": (12, 64, 20, dict(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65, bias=False)),
              "GPT-2 124M, 2 x 512": (2, 512, 1, dict(vocab_size=50304, bias=False))}
    for name, (B, T, n, shape) in shapes.items():
        runs = {"plainGPT": training_step(GPT(GPTConfig(**shape)), B, T, device, bf16)}
        if nanogpt:
            module = theirs(nanogpt)
            with redirect_stdout(open(os.devnull, "w")):
                runs["nanoGPT"] = training_step(module.GPT(module.GPTConfig(dropout=0.0, **shape)), B, T, device, bf16, theirs=True)
        taken = times(*(lambda step=step: [step() for _ in range(n)] for step in runs.values()), repeat=5)
        print(f"a training step, {name}")
        for run, seconds in zip(runs, taken):
            print(f"  {run:22} {ms([s / n for s in seconds]):36} {statistics.median(taken[-1]) / statistics.median(seconds):5.2f} times as fast as the last")
    print("a training step, GPT-2 124M, 1 x 4,096; memory above parameters and optimizer")
    configs = {name: GPTConfig(block_size=4096, **VARIANTS[name]) for name in ("modern", "gpt2")}
    memory = added_mb(later_step, *((config, 4096, device, bf16) for config in configs.values()))
    taken = times(*(training_step(GPT(config), 1, 4096, device, bf16) for config in configs.values()), repeat=3)
    for run, seconds, mb in zip(configs, taken, memory):
        print(f"  {run:22} {ms(seconds):36} {statistics.median(taken[-1]) / statistics.median(seconds):5.2f} times as fast as the last, {mb:,.0f} MB")


RECIPE = ("--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 "
          "--max_iters=2000 --lr_decay_iters=2000 --dropout=0.0").split()   # nanoGPT's README


def start(nanogpt):
    """Whole commands, data ready: seconds from the command to a line that it prints"""
    def until(pattern, folder, *command):
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as out:
            process = subprocess.Popen([sys.executable, *command, f"--out_dir={out}"], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                       text=True, encoding="utf-8", env=os.environ | {"PYTHONUNBUFFERED": "1"})
            for line in process.stdout:
                if (m := re.search(pattern, line)) and (not m.groups() or float(m[1]) < 1.898):
                    break
            else:
                raise InputError(f"{' '.join(command)} in {folder} never printed {pattern}: run it there to see why")
            found = time.perf_counter() - begun
            process.kill()
            process.wait()
        return found
    if not (HERE / "data/shakespeare/meta.json").exists():
        train.prepare("shakespeare")
    train_py = ("train.py", "config/shakespeare.py")
    runs = {"to the first step": (r"step 1/", HERE, *train_py, "--eval_iters=1", "--log_interval=1"),
            "to a validation loss below 1.898": (r"validation loss ([\d.]+),", HERE, *train_py)}
    if nanogpt:
        recipe = ("train.py", "config/train_shakespeare_char.py", *RECIPE)
        runs["to the first step, nanoGPT"] = (r"iter 0", nanogpt, *recipe, "--eval_iters=1")
        runs["to the end, nanoGPT"] = (r"iter 2000", nanogpt, *recipe)
    found = {name: [] for name in runs}
    for _ in range(3):
        for name, run in runs.items():
            found[name].append(until(*run))
    for name, seconds in found.items():
        print(f"{name:36} {statistics.median(seconds):6.1f} s ({min(seconds):.1f} to {max(seconds):.1f})", flush=True)


@torch.no_grad()
def decode(new=256):
    torch.manual_seed(0)
    idx, weight = torch.randint(50257, (1, 16)), torch.ones(124_439_808)
    speed = weight.numel() * 4 / min(times(weight.sum, repeat=9)[0])
    print(f"reading memory: {speed / 1e9:.1f} GB/s. GPT-2 124M, greedy, a prompt of 16 tokens, {new} new ones; share of what reading the weights alone would allow")
    for dtype in (torch.float32, torch.bfloat16):
        models = [GPT(GPTConfig()).eval().to(dtype) for _ in range(2)]
        compile_products(models[1])
        runs = {"plainGPT": lambda: models[0].generate(idx, new, temperature=0), "plainGPT --compile": lambda: models[1].generate(idx, new, temperature=0)}
        try:
            import transformers
            model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval().to(dtype)
            runs[f"transformers {transformers.__version__}"] = lambda: model.generate(
                idx, attention_mask=torch.ones_like(idx), max_new_tokens=new, min_new_tokens=new, do_sample=False)
        except ImportError:
            print("transformers is not installed: no comparison")
        taken = times(*runs.values(), repeat=3)
        for name, seconds in zip(runs, taken):
            rate, limit = new / statistics.median(seconds), speed / weight.numel() / dtype.itemsize
            print(f"  {str(dtype)[6:]:9}{name:22} {rate:6.1f} tokens/s ({new / max(seconds):.1f} to {new / min(seconds):.1f}), {rate / limit:.0%}, "
                  f"{statistics.median(taken[-1]) / statistics.median(seconds):.2f} times the last", flush=True)

    def one_more(name, length, B, **switches):
        model = GPT(GPTConfig(block_size=8192, **switches)).eval()
        cache, token = fill(model, length, B), torch.randint(50257, (B, 1))
        runs[name] = lambda: model(token, cache=cache)
    for title, cases in {"one more token, batch 8, after 4,096, float32": dict(grouped=(4096, 8, GQA), multi_head=(4096, 8, {})),
                         "one more token, RoPE and W = 256, batch 1": {f"after {n:,}": (n, 1, ROPE | SWA) for n in (512, 4096)}}.items():
        runs = {}
        for name, (length, B, switches) in cases.items():
            one_more(name, length, B, **switches)
        taken = times(*runs.values(), repeat=25)
        print(title)
        for name, seconds in zip(runs, taken):
            print(f"  {name:22} {ms(seconds):36} {statistics.median(taken[-1]) / statistics.median(seconds):5.2f} times as fast as the last", flush=True)


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

held, clip, save = {}, torch.nn.utils.clip_grad_norm_, train.weights.save_checkpoint
torch.nn.utils.clip_grad_norm_, train.weights.save_checkpoint = clip_and_note, save_and_note
train.GPT.from_pretrained = lambda path: train.GPT(train.GPTConfig(8, 8, 1, 1, 8))   # nothing was saved; no sample at the end
train.GPT.generate = lambda self, idx, *args, **options: idx
train.launch.run(train.main)
"""


def processes():
    threads = torch.get_num_threads()
    models = {"config/shakespeare.py": ["config/shakespeare.py", "--device=cpu", "--optimizer=adamw", "--learning_rate=3e-3", "--max_iters=200", "--log_interval=100"],
              "GPT-2 124M, 8 x 256 tokens": ["--block_size=256", "--vocab_size=50304", "--batch_size=8", "--micro_batch_size=2",
                                             "--warmup_iters=0", "--device=cpu", "--max_iters=2", "--log_interval=1"]}
    modes = {"alone": (1, []), "DDP": (2, []), "FSDP": (2, ["--fsdp"])}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("config", "train.py"):
            os.symlink(HERE / name, Path(folder, name))
        Path(folder, "held.py").write_text(HELD)
        Path(folder, "text.txt").write_text("".join(p.read_text(encoding="utf-8") for p in HERE.glob("*.py")), encoding="utf-8")
        env = os.environ | {"PYTHONPATH": str(HERE)}
        subprocess.run([sys.executable, HERE / "prepare_data.py", "--input", "text.txt", "--name", "text"], cwd=folder, env=env, check=True, capture_output=True)
        for name, flags in models.items():
            speeds, held = {mode: [] for mode in modes}, {}
            for _ in range(3):
                for mode, (n, more) in modes.items():
                    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"] if n > 1 else []
                    command = [*torchrun, "held.py", *flags, *more, "--dataset=text", "--dtype=float32", "--eval_interval=1000000", "--eval_iters=1",
                               "--checkpoint_interval=1000000"]
                    out = subprocess.run([sys.executable, *command], cwd=folder, env=env | {"OMP_NUM_THREADS": str(max(1, threads // n))},
                                         check=True, capture_output=True, text=True, encoding="utf-8").stdout
                    speeds[mode].append(float(re.findall(r"([\d,]+) tokens/s", out)[-1].replace(",", "")))
                    held[mode] = re.findall("held: .*", out)[-1]
            print(name)
            for mode, (n, _) in modes.items():
                ratio = statistics.median(speeds[mode]) / statistics.median(speeds["alone"])
                print(f"  {mode:6}{n} x {max(1, threads // n)} thread(s)  {statistics.median(speeds[mode]):8,.0f} tokens/s ({min(speeds[mode]):,.0f} to "
                      f"{max(speeds[mode]):,.0f})  {ratio:.2f} of alone; {held[mode]}", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# The papers' claims, in miniature

SMALL = ["config/shakespeare.py", "--device=cpu", "--n_layer=4", "--n_head=8", "--n_embd=128", "--block_size=128", "--batch_size=16",
         "--micro_batch_size=16", "--max_iters=300", "--optimizer=muon", "--dropout=0", "--learning_rate=1.5e-2", "--warmup_iters=40", "--eval_interval=100",
         "--eval_iters=30", "--log_interval=50"]   # 2,048 tokens a step; 480 sequences of 128 validate
SEEDS = (1, 2, 3)
TURNED = ["--use_rope"]
KV = {f"kv{n}": ["--use_gqa", f"--n_kv_head={n}"] for n in (4, 2, 1)}
WINDOWS = {f"W{w}": ["--use_swa", f"--window_size={w}"] for w in (8, 16, 32, 64)}
WINDOWS |= {"growing": ["--use_swa", "--window_size=(8,24,40,56)"], "shrinking": ["--use_swa", "--window_size=(56,40,24,8)"]}
FLAGS = {"gpt2": [], "rope": TURNED, **KV, **WINDOWS, "rope+W32": TURNED + WINDOWS["W32"], "modern": TURNED + KV["kv2"] + WINDOWS["W32"],
         "modern 540 steps": TURNED + KV["kv2"] + WINDOWS["W32"] + ["--max_iters=540"], "rope+W16": TURNED + WINDOWS["W16"],
         "rope+W8": TURNED + WINDOWS["W8"], "rope+W4": [*TURNED, "--use_swa", "--window_size=4"],
         "rope+hybrid": [*TURNED, "--use_swa", "--window_size=(4,0,4,0)"]}
TEXTS = ("shakespeare", "stdlib")
# part -> the name of its rows, what is read, variants, further flags. A variant of "train" stands in several parts, and is trained once.
PARTS = {"rope": ("train", TEXTS, ("gpt2", "rope", "rope+W32", "modern"), []),
         "gqa": ("train", TEXTS, ("gpt2", *KV), []),
         "windows": ("train", TEXTS, ("gpt2", *WINDOWS), []),
         "recall": ("recall", ("recall",), ("rope+W4", "rope+W8", "rope+W16", "rope+W32", "rope+hybrid", "rope"), []),
         "longer": ("longer", ("stdlib",), ("gpt2", "rope", "W8"), ["--max_iters=900"]),
         "time": ("time", ("stdlib",), ("gpt2", "modern", "modern 540 steps"), ["--block_size=1024", "--batch_size=2", "--micro_batch_size=2"])}
LENGTHS = (128, 256, 512, 1024)   # read at once; trained on 128
CONVERT = "mean", "first", "random"
COLUMNS = ("experiment", "data", "variant", "seed", "step", "length", "value")   # value: validation loss in nats; of "seconds" seconds


def recall_text():
    """Lines of 24 random letters, each line twice: the second can be known, by whoever sees 25 characters back"""
    rng = random.Random(0)
    return "".join(2 * ("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=24)) + "\n") for _ in range(48_000))


@torch.no_grad()
def loss_at(folder, dataset, T):
    """Validation loss on the last 64 of every 1,024 characters, read together with the T - 64 before them: the same 64 for every T"""
    model = GPT.from_pretrained(folder / "ckpt.pt", **({"block_size": T} if T > 128 else {}))
    data, total = Data(Path("data") / dataset, load_meta(Path("data") / dataset), "val", max(LENGTHS), seed=0), 0.0
    for i in range(100):
        x, y = data.windows([i])
        y[:, :-64] = -1
        total += model(x[:, -T:], y[:, -T:])[1].item() / 100
    return total


def convert(source, target, how, n_kv_head):
    """Write a run's last checkpoint again, with n_kv_head key/value heads made from all of its heads: their mean, the first, or random"""
    checkpoint = weights.load_checkpoint(source / "ckpt.pt")
    model = GPT.from_pretrained(source / "ckpt.pt", use_gqa=True, n_kv_head=n_kv_head)   # the mean
    H, D, C = model.config.n_head, model.config.n_embd // model.config.n_head, model.config.n_embd
    for block, old in zip(model.h, GPT.from_pretrained(source / "ckpt.pt").h):
        new = block.attn.c_attn.weight.data[C:].view(2, n_kv_head, D, C)
        if how == "first":
            new.copy_(old.attn.c_attn.weight.data[C:].view(2, n_kv_head, H // n_kv_head, D, C)[:, :, 0])
        if how == "random":
            torch.nn.init.normal_(new, std=0.02)
    target.mkdir()
    torch.save(checkpoint | dict(model=model.state_dict(), gpt_config=asdict(model.config)), target / "best.pt")


def train_and_look(job):
    """One run of train.py on one thread -> the job, and its rows, see COLUMNS"""
    folder, dtype, (kind, dataset, variant, seed), flags = job
    os.chdir(folder)
    torch.set_num_threads(1)
    out, rows = Path(f"{kind}-{dataset}-{variant}-{seed}"), []
    length = 1024 if kind == "time" else 128

    def run(out, *flags):
        """-> {step: (validation loss, seconds of training until then)}"""
        with open(os.devnull, "w") as quiet, redirect_stdout(quiet):
            train.main([*SMALL, *flags, f"--dtype={dtype}", f"--dataset={dataset}", f"--seed={seed}", f"--out_dir={out}"])
        points, seconds, tokens = {}, 0.0, 0
        with open(out / "metrics.csv") as f:
            for r in csv.DictReader(f):
                if r["tokens_per_s"]:
                    seconds, tokens = seconds + (int(r["tokens"]) - tokens) / int(r["tokens_per_s"]), int(r["tokens"])
                if r["val_loss"]:
                    points[int(r["step"])] = float(r["val_loss"]), seconds
        return points

    for step, (loss, seconds) in run(out, *flags).items():
        rows.append((kind, dataset, variant, seed, step, length, loss))
        if kind == "time":   # of these alone: whatever else runs here would show in it
            rows.append(("seconds", dataset, variant, seed, step, length, seconds))
    if kind == "train" and "--use_rope" in flags:
        for T in LENGTHS:
            rows.append(("length", dataset, variant, seed, 300, T, loss_at(out, dataset, T)))
    if kind == "train" and variant == "gpt2":   # uptraining: 5% and 10% of the steps, at a third of the learning rate
        more = ["--max_iters=30", "--eval_interval=15", "--warmup_iters=0", "--learning_rate=5e-3", "--dropout=0"]
        for kv in (2, 1):
            for how in CONVERT:
                converted = Path(f"{out}-{how}-{kv}")
                convert(out, converted, how, kv)
                for step, (loss, _) in run(Path(f"{converted}-more"), f"--init_from={converted}", *KV[f"kv{kv}"], *more).items():
                    rows.append(("convert", dataset, f"kv{kv} {how}", seed, step, 128, loss))
        for step, (loss, _) in run(Path(f"{out}-more"), f"--init_from={out}", *more).items():
            rows.append(("convert", dataset, "multi-head", seed, step, 128, loss))
    return job[2], rows


def read_csv(name):
    try:
        with open(HERE / "assets" / name, encoding="utf-8") as f:
            return list(csv.DictReader(line for line in f if not line.startswith("#")))
    except FileNotFoundError:
        return []


def job_of(row):
    """The run that a row of papers.csv came from: kind, data, variant, seed"""
    kind = {"length": "train", "convert": "train", "seconds": "time"}.get(row["experiment"], row["experiment"])
    return kind, row["data"], "gpt2" if row["experiment"] == "convert" else row["variant"], int(row["seed"])


def jobs_of(parts):
    """{(kind, data, variant, seed): flags}"""
    return {(kind, dataset, variant, seed): [*FLAGS[variant], *more] for kind, texts, variants, more in map(PARTS.get, parts)
            for dataset in texts for variant in variants for seed in SEEDS}


def papers(parts):
    """Run the parts, all by default; their rows replace those in assets/papers.csv, the others stay."""
    if unknown := set(parts) - PARTS.keys():
        raise InputError(f"papers {unknown.pop()}: must be one of {', '.join(PARTS)}, or nothing for all")
    dtype = "bfloat16" if machine()[1] else "float32"   # tried once, for all
    (HERE / "assets").mkdir(exist_ok=True)
    (HERE / "data").mkdir(exist_ok=True)
    every, wanted = jobs_of(PARTS), jobs_of(parts or PARTS)
    results = {}   # job -> rows
    for row in read_csv("papers.csv"):
        results.setdefault(job_of(row), []).append(tuple(row.values()))
    with tempfile.TemporaryDirectory() as folder, workers(torch.get_num_threads()) as pool:
        for name in ("config", "data"):
            os.symlink(HERE / name, Path(folder, name))
        for dataset in {dataset for _, dataset, _, _ in wanted}:
            if dataset == "recall":
                Path(folder, "recall.txt").write_text(recall_text(), encoding="utf-8")
                prepare_text(Path("data/recall"), [Path(folder, "recall.txt")], "char")
            elif not Path("data", dataset, "meta.json").exists():
                train.prepare(dataset)
        jobs = [(folder, dtype, *job) for job in wanted.items()]
        for i, (job, rows) in enumerate(pool.imap(train_and_look, jobs), 1):
            results[job] = [(*row[:-1], f"{row[-1]:.4f}") for row in rows]
            with weights.replacing(HERE / "assets" / "papers.csv") as f:
                f.write("".join(",".join(map(str, row)) + "\n" for row in (COLUMNS, *(r for job in every for r in results.get(job, [])))).encode())
            print(f"{i} of {len(jobs)}: {' '.join(map(str, job))} {rows[0][-1]:.4f} to {[r for r in rows if r[0] == job[0]][-1][-1]:.4f}", flush=True)
    summary()


def summary():
    """Means over the seeds, with the smallest and largest"""
    groups = {}
    for r in read_csv("papers.csv"):
        groups.setdefault(tuple(r[k] for k in COLUMNS[:3] + COLUMNS[4:6]), []).append(float(r["value"]))
    print("experiment, data, variant, step, length: mean over the seeds (smallest to largest)")
    for key, values in groups.items():
        print(f"  {', '.join(key):58} {statistics.mean(values):7.3f} ({min(values):.3f} to {max(values):.3f})")


# ----------------------------------------------------------------------------------------------------------------------
# Plots: one idea each, a variant always in the same colour and with the same marker, so that they also read in grey

STYLE = dict(gpt2=("#222222", "o", "-"), rope=("#1f77b4", "s", "--"), gqa=("#ff7f0e", "^", "-."), swa=("#2ca02c", "D", ":"),
             modern=("#d62728", "v", (0, (5, 1, 1, 1, 1, 1))), rope_swa=("#17becf", "P", (0, (4, 2))), masked=("#999999", "x", (0, (1, 1))),
             random=("#8c564b", "x", ":"), first=("#9467bd", "<", "--"), mean=("#ff7f0e", "^", "-."))


def plots():
    try:
        import matplotlib
    except ImportError:
        raise InputError("plots need matplotlib: pip install -r requirements-dev.txt") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False})
    cost, claims = read_csv("variants.csv"), read_csv("papers.csv")

    def measured(what, variant, scale=1.0):
        """{T: (smallest, median, largest)}"""
        return {int(r["T"]): [scale * float(r[k]) for k in ("low", "median", "high")] for r in cost if (r["what"], r["variant"]) == (what, variant)}

    def seeds(experiment, variant, dataset="shakespeare", by="step", **only):
        """{step, or another column: (smallest, mean, largest) of the seeds}"""
        points = {}
        for r in claims:
            if (r["experiment"], r["variant"], r["data"]) == (experiment, variant, dataset) and all(r[k] == str(v) for k, v in only.items()):
                points.setdefault(int(r[by]), []).append(float(r["value"]))
        return {x: (min(v), statistics.mean(v), max(v)) for x, v in points.items()}

    def last(experiment, variant, dataset="shakespeare"):
        """The same after the last step, without the step"""
        points = seeds(experiment, variant, dataset)
        return points[max(points)]

    def figure(title, *axes):
        fig, ax = plt.subplots(1, len(axes), figsize=(3.7 * len(axes), 3.2), squeeze=False)
        fig.suptitle(title, fontsize=10)
        for a, (x, y) in zip(ax[0], axes):
            a.set(xlabel=x, ylabel=y)
        return fig, *ax[0]

    def logarithmic(ax, xs):
        ax.set_xscale("log", base=2)
        ax.set_xticks(xs, [f"{x:,}" for x in xs])
        ax.minorticks_off()

    def line(ax, label, points, style, joined=True):
        """points: {x: (low, middle, high)}: a line through the middles, bars from low to high"""
        colour, marker, dashes = STYLE[style]
        low, mid, high = zip(*(points[x] for x in sorted(points)))
        ends = [[m - x for m, x in zip(mid, low)], [x - m for m, x in zip(mid, high)]]
        ax.errorbar(sorted(points), mid, ends, label=label, color=colour, marker=marker, linestyle=dashes if joined else "", markersize=4,
                    capsize=2, linewidth=1.4, elinewidth=0.8)

    def save(fig, name):
        fig.tight_layout()
        fig.savefig(HERE / "assets" / f"{name}.png", dpi=130)
        plt.close(fig)

    # 1: what it costs
    fig, attend_, size, speed = figure("Cost: attention alone, the cache, and one more token", ("tokens T", "attention, forward and backward, ms"),
                                       ("tokens of context", "cache of GPT-2 124M in float32, MB"), ("tokens of context", "one more token, four blocks, ms"))
    for name, label, style in (("full", "full", "gpt2"), ("masked", "masked: W = 256", "masked"), ("blocks", "in blocks: W = 256", "swa")):
        line(attend_, label, measured("attention", name, 1e3), style)
    lengths = [2**n for n in range(8, 16)]
    for name, switches in VARIANTS.items():
        line(size, name, {n: 3 * [cache_bytes(GPTConfig(**switches), n) / 1e6] for n in lengths}, name)
        line(speed, name, {n: 3 * [middle] for n, (_, middle, _) in measured("decode", name, 1e3).items()}, name)   # bars would hide each other
    for ax, xs in ((attend_, (1024, 4096, 16384)), (size, lengths[::2]), (speed, sorted(measured("decode", "gpt2")))):
        logarithmic(ax, xs)
    for ax, ys in ((attend_, (10, 100, 1000, 10000)), (size, (10, 100, 1000))):
        ax.set_yscale("log")
        ax.set_yticks(ys, [f"{y:,}" for y in ys])
    speed.set_ylim(bottom=0)
    attend_.legend()
    size.legend()
    save(fig, "cost")

    # 2: RoPE
    fig, course, length = figure("Rotary against learned positions: tiny Shakespeare, trained on 128 characters",
                                 ("step", "validation loss"), ("characters read at once", "loss of the last 64"))
    for name in ("gpt2", "rope"):
        line(course, name, {step: loss for step, loss in seeds("train", name).items() if step}, name)
    for name, label, style in (("rope", "rope", "rope"), ("rope+W32", "rope, W = 32", "rope_swa"),
                               ("modern", "rope, gqa, W = 32", "modern")):
        line(length, label, seeds("length", name, by="length"), style)
    logarithmic(length, LENGTHS)
    course.legend()
    length.legend()
    save(fig, "rope")

    # 3: GQA
    fig, heads, steps = figure("Fewer key/value heads for eight query heads: tiny Shakespeare", ("key/value heads", "validation loss, trained so from the start"),
                               ("steps of training after conversion (30 = 10%)", "validation loss, 2 heads"))
    line(heads, "8 = multi-head", {8: last("train", "gpt2")}, "gpt2")
    line(heads, "grouped", {n: last("train", f"kv{n}") for n in (4, 2, 1)}, "gqa")
    logarithmic(heads, (1, 2, 4, 8))
    for how in CONVERT[::-1]:
        line(steps, f"from the {how}" if how != "random" else how, seeds("convert", f"kv2 {how}"), how)
    line(steps, "not converted", seeds("convert", "multi-head"), "gpt2")
    heads.legend()
    steps.legend()
    save(fig, "gqa")

    # 4: windows
    fig, course, depth, recall = figure("Windows: a head start, and what is out of sight is gone", ("step, Python library", "validation loss"),
                                        ("four windows of mean 32, tiny Shakespeare", "validation loss"), ("window, with rope", "loss on lines said twice, 25 apart"))
    for name, label, style in (("gpt2", "full attention", "gpt2"), ("W8", "W = 8", "swa"), ("rope", "full, with rope", "rope")):
        line(course, label, {step: loss for step, loss in seeds("longer", name, "stdlib").items() if step}, style)
    course.legend()
    for i, name in enumerate(("shrinking", "W32", "growing")):
        line(depth, name, {i: last("train", name)}, "swa", joined=False)
    depth.set_xticks(range(3), ["56 40\n24 8", "32 32\n32 32", "8 24\n40 56"])
    depth.set_xlim(-0.5, 2.5)
    for i, name in enumerate(PARTS["recall"][2]):
        line(recall, name, {i: last("recall", name, "recall")}, "rope" if name == "rope" else "rope_swa", joined=False)
    recall.set_xticks(range(6), ["4", "8", "16", "32", "4 full\n4 full", "full"])
    recall.set_xlim(-0.5, 5.5)
    save(fig, "windows")

    # 5: all three
    fig, seconds, ladder = figure("All three together", ("seconds of training, the fastest of three seeds", "validation loss, T = 1,024, Python library"),
                                  ("", "validation loss, T = 128, tiny Shakespeare"))
    for name, label, style in (("gpt2", "gpt2, 300 steps", "gpt2"), ("modern", "all three, 300 steps", "modern"), ("modern 540 steps", "all three, 540 steps", "rope_swa")):
        times_, losses = seeds("seconds", name, "stdlib"), seeds("time", name, "stdlib")
        line(seconds, label, {times_[step][0]: losses[step] for step in losses if step}, style)
    seconds.legend()
    names = dict(gpt2="gpt2", kv2="2 of 8\nkv heads", rope="rope", W32="W = 32", modern="all\nthree")
    for i, (name, style) in enumerate(zip(names, ("gpt2", "gqa", "rope", "swa", "modern"))):
        line(ladder, name, {i: last("train", name)}, style, joined=False)
    ladder.set_xticks(range(5), names.values())
    ladder.set_xlim(-0.5, 4.5)
    save(fig, "together")


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = dict(attention=attention, decode=decode, endless=endless, processes=processes)
    parser.add_argument("what", nargs="*", help="a command (and of papers the parts), or config files; nothing = the variants")
    parser.add_argument("--nanogpt", metavar="FOLDER", help="a clone of nanoGPT to run beside: steps, start")
    parser.add_argument("--csv", action="store_true", help="write assets/variants.csv")
    parser.add_argument("--plot", action="store_true", help="the same, and draw assets/*.png anew")
    args = parser.parse_args(argv)
    nanogpt = args.nanogpt and Path(args.nanogpt).resolve()
    os.chdir(HERE)
    what = args.what[0] if args.what else ""
    if what in ("start", "decode", "endless", "papers", "processes"):   # of CPUs; config/shakespeare.py, too, must see none but these
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    if what in commands:
        commands[what]()
    elif what in ("steps", "start"):
        dict(steps=steps, start=start)[what](nanogpt)
    elif what == "papers":
        papers(args.what[1:])
    elif what == "plots":
        plots()
        summary()
    elif what and not what.endswith(".py"):
        raise InputError(f"{what} is neither a command nor a config file: {', '.join([*commands, 'steps', 'start', 'papers', 'plots'])}")
    else:
        variants(args.what, args.csv or args.plot)
        if args.plot:
            plots()


if __name__ == "__main__":
    launch.run(main)
