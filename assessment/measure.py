"""
Time and memory of functions, and the training step that several commands measure.

Whatever is compared is measured in one run, alternating, after a warm-up. Times are medians, with
the smallest and the largest value in parentheses.
"""

import csv
import ctypes
import io
import math
import multiprocessing
import os
import platform
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch

import train
from model import GPT, GPTConfig
from plumbing.device import choose_attention_kernels, choose_device, keep_freed_memory
from plumbing.errors import InputError
from plumbing.files import replacing

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results"


def print_versions():
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")


def machine():
    """
    -> device, whether bfloat16 is faster there, and a line that says so. Apple GPUs are left out:
    timing them needs another clock.
    """
    return choose_device("cuda" if torch.cuda.is_available() else "cpu", "auto")


def hardware(gpu=True):
    """The GPU, if there is one that is used; else the processor and how fast it reads memory"""
    if gpu and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    read = memory_speed(torch.device("cpu"))
    return f"{processor()}, {torch.get_num_threads()} threads, reads {read / 1e9:.0f} GB/s"


def memory_speed(device, n=124_439_808):
    """Bytes per second in which as many numbers as GPT-2 124M has are read, at best"""
    weights = torch.ones(n, device=device)
    return weights.nbytes / min(times({"read": weights.sum}, repeat=9)["read"])


def processor():
    """Its name, its generation and its instructions for bfloat16, as Linux tells them"""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {}
    for line in lines:
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    words = [fields.get("model name", platform.machine())]
    for name in ("cpu family", "model"):
        if name in fields:
            words.append(f"{name} {fields[name]}")
    flags = fields.get("flags", "").split()
    words += [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return " ".join(words)


def cpu_only():
    """Hide GPUs from this process and those it starts: config/shakespeare.py looks for them too."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def in_new_process(f, *args):
    """f(*args), computed in a process that has done nothing else"""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(f, *args).result()


# ----------------------------------------------------------------------------------------------
# Time

def seconds_of(f):
    """How long f() takes; on a GPU, from when it begins f's work to when it has finished it."""
    if isinstance(f, Apart):
        return f.seconds()
    if not torch.cuda.is_available():
        start = time.perf_counter()
        f()
        return time.perf_counter() - start
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    start.record()
    f()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def times(functions, repeat):
    """{name: function} -> {name: list of seconds}; alternating, so that all meet the same drift"""
    taken = {name: [] for name in functions}
    for _ in range(repeat):
        for name, f in functions.items():
            f()   # not counted: whatever ran before left caches and memory as it needed them
            taken[name].append(seconds_of(f))
    return taken


def times_apart(programs, repeat):
    """{name: (make, *its arguments)} -> as times, of the functions that make returns, see Apart"""
    with ExitStack() as stack:
        functions = {}
        for name, program in programs.items():
            functions[name] = Apart(*program)
            stack.callback(functions[name].close)
        return times(functions, repeat)


def spread(values, spec, unit=""):
    """'median unit (smallest to largest)', each number formatted by spec"""
    middle = statistics.median(values)
    return f"{middle:{spec}}{unit} ({min(values):{spec}} to {max(values):{spec}})"


def milliseconds(seconds):
    return spread([1e3 * s for s in seconds], ".1f", " ms")


def times_as_fast(seconds, base):
    """How many times as fast as base, by medians"""
    return statistics.median(base) / statistics.median(seconds)


# Student's t, two-sided 95%, by degrees of freedom; 24: of the tokens that cost.py times
T_95 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 24: 2.064}


def interval(values):
    """-> their mean, and half of its 95% interval"""
    n = len(values)
    if n - 1 not in T_95:
        raise InputError(f"an interval needs 2 to 9 or 25 values, found {n}")
    return statistics.mean(values), T_95[n - 1] * statistics.stdev(values) / n ** 0.5


def print_times(taken, notes=None):
    """{name: seconds}: a line each, with its ratio to the last and, if given, its note"""
    last = list(taken.values())[-1]
    for name, seconds in taken.items():
        note = f", {notes[name]}" if notes else ""
        ratio = times_as_fast(seconds, last)
        measured = milliseconds(seconds)
        print(f"  {name:22} {measured:36} {ratio:5.2f} times as fast as the last{note}")


class Apart:
    """
    The function that make(*args) returns, called in a process of its own, which lives until
    close(). So what one program sets for its whole process, how freed memory is kept for example,
    does not reach the others.
    """

    def __init__(self, make, *args):
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self.pool.submit(make_here, make, args).result()

    def __call__(self):
        self.seconds()

    def seconds(self):
        """How long a call takes, as seconds_of measures it there"""
        return self.pool.submit(seconds_here).result()

    def close(self):
        self.pool.shutdown()


MADE = []   # in the process of an Apart: the function it calls


def make_here(make, args):
    MADE.append(make(*args))


def seconds_here():
    return seconds_of(MADE[0])


# ----------------------------------------------------------------------------------------------
# Memory, in MB of 10^6 bytes: the GPU's if there is one, else this process's (NaN if not on Linux)

def start_peak():
    """The MB held now; peak_mb counts anew from here."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 1e6
    try:
        # Freed memory goes back to the system, so that it counts again when it is used again.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except (OSError, AttributeError, TypeError):   # not Linux with glibc
        return math.nan
    return process_mb("VmRSS:")


def peak_mb():
    """The most MB held at once since start_peak, or since this process started."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return process_mb("VmHWM:")


def process_mb(field):
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return math.nan
    for line in lines:
        if line.startswith(field):
            return int(line.split()[1]) * 1024 / 1e6
    return math.nan


def added_mb(make, *args):
    """The most MB that the function make(*args) adds to what was held before, in a new process."""
    # glibc then returns each freed tensor to the system; otherwise it would still count as held.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    try:
        return in_new_process(measure_added_mb, make, *args)
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]


def measure_added_mb(make, *args):
    f = make(*args)
    before = start_peak()
    f()
    return peak_mb() - before


# ----------------------------------------------------------------------------------------------
# A training step

class RandomTokens:
    """Takes the place of train.py's data; every batch is the same random tokens."""

    def __init__(self, vocab_size, B, T):
        self.x = torch.randint(vocab_size, (B, T))
        self.y = torch.randint(vocab_size, (B, T))

    def batch(self, numbers):
        return self.x, self.y


def training_step(model, B, T, device, bf16):
    """-> a function that does one step as train.py does it with AdamW; compiled on CUDA alone"""
    model.to(device)
    compile_on_cuda(model, device)
    choose_attention_kernels(device, bf16, model.config)
    optimizers = train.make_optimizers(model, train.TrainConfig(), device)
    return step_function(model, optimizers, B, T, device, bf16)


def step_as_trained(config, B, T, device, bf16):
    """The same, with the setting for memory that train.py makes: for a process of its own"""
    if device.type == "cpu":
        keep_freed_memory()
    return training_step(GPT(config), B, T, device, bf16)


def nanogpt_step(model, B, T, device, bf16):
    """The same for nanoGPT's model with its own optimizer. On a CPU it computes in float32."""
    model.to(device)
    compile_on_cuda(model, device)
    forward = model.forward
    model.forward = lambda x, y, loss_only: forward(x, y)   # as train_step calls it
    bf16 = bf16 and device.type == "cuda"
    choose_attention_kernels(device, bf16, GPTConfig(block_size=T))
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)
    return step_function(model, [optimizer], B, T, device, bf16)


def compile_on_cuda(model, device):
    if device.type == "cuda":
        model.forward = torch.compile(model.forward, dynamic=False)


def step_function(model, optimizers, B, T, device, bf16):
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    model.train()
    c = train.TrainConfig(batch_size=B, micro_batch_size=B)
    place = train.Place(device, bf16, rank=0, world=1, micro=B)
    data = RandomTokens(model.config.vocab_size, B, T)

    def step():
        train.train_step(0, model, optimizers, data, c, place)
    return step


def step_after_first(config, T, device, bf16):
    """A step of one sequence, after the first one, which allocates the optimizer's state"""
    step = training_step(GPT(config), 1, T, device, bf16)
    step()
    return step


# ----------------------------------------------------------------------------------------------
# Tables

def markdown(columns, rows):
    """rows: {name: cells} -> a table"""
    lines = [f"| | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    return "\n".join(lines) + "\n"


def print_table(title, columns, rows):
    print(f"\n{title}\n\n{markdown(columns, rows)}", end="")


def read_results(name):
    """A CSV file of results/ -> a list of {column: text}; empty if there is no such file"""
    path = RESULTS / name
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as f:
        return list(csv.DictReader(line for line in f if not line.startswith("#")))


def write_results(name, columns, rows, *comments):
    """The other way, in place of the old file at once; rows: tuples"""
    text = io.StringIO()
    for comment in comments:
        text.write(f"# {comment}\n")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    RESULTS.mkdir(exist_ok=True)
    with replacing(RESULTS / name) as f:
        f.write(text.getvalue().encode())
