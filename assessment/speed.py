"""
How fast it is: training steps, start-up, decoding, several processes, and a profile.

Each part is called as part(nanogpt, tiny), prints, and returns {work: {who: (unit, values)}}.
nanogpt is the folder of its clone, or None; tiny asks for a small model, only to see that the part
works. A part ignores what it does not need.
"""

import importlib.util
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import torch

from assessment.cost import GQA, ROOM, ROPE, SWA, SWITCHES, TOKENS_TIMED, fill
from assessment.measure import (
    ROOT,
    added_mb,
    hardware,
    in_new_process,
    machine,
    memory_speed,
    nanogpt_step,
    print_times,
    print_versions,
    read_results,
    spread,
    step_after_first,
    step_as_trained,
    times,
    times_apart,
    times_as_fast,
    write_results,
)
from model import GPT, GPTConfig
from plumbing.device import disable_cudnn_attention
from plumbing.errors import InputError
from prepare_data import prepare, prepare_text

# ----------------------------------------------------------------------------------------------
# steps

SHAPES = {   # batch size, tokens, steps timed together, and the fields of both projects' configs
    "nanoGPT's CPU recipe, 12 x 64": (12, 64, 20, {
        "n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "vocab_size": 65, "bias": False,
    }),
    "GPT-2 124M, 2 x 512": (2, 512, 1, {"vocab_size": 50304, "bias": False}),
}
TINY = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 32, "vocab_size": 65, "bias": False}


def nanogpt_model(folder, shape):
    """nanoGPT's own GPT, from a clone of its repository"""
    spec = importlib.util.spec_from_file_location("nanogpt", folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt"] = module   # its dataclass looks itself up there
    spec.loader.exec_module(module)
    with redirect_stdout(io.StringIO()):
        return module.GPT(module.GPTConfig(dropout=0.0, **shape))


def our_steps(shape, B, T, device, bf16, n):
    return repeated(step_as_trained(GPTConfig(**shape), B, T, device, bf16), n)


def nanogpts_steps(folder, shape, B, T, device, bf16, n):
    return repeated(nanogpt_step(nanogpt_model(folder, shape), B, T, device, bf16), n)


def repeated(f, n):
    def run():
        for _ in range(n):
            f()
    return run


def in_milliseconds(taken):
    """{who: list of seconds} -> {who: (unit, values)}, as every part returns them"""
    return {who: ("ms", [1e3 * s for s in seconds]) for who, seconds in taken.items()}


def steps(nanogpt, tiny):
    """A training step beside nanoGPT's, and of long texts with and without the switches"""
    device, bf16, line = machine()
    print(line)
    found = {}
    shapes = {"a tiny model": (2, 32, 1, TINY)} if tiny else SHAPES
    for name, (B, T, n, shape) in shapes.items():
        runs = {"plainGPT": (our_steps, shape, B, T, device, bf16, n)}
        if nanogpt:
            runs["nanoGPT"] = nanogpts_steps, nanogpt, shape, B, T, device, bf16, n
        taken = times_apart(runs, repeat=5)
        print(f"a training step, {name}")
        taken = {run: [s / n for s in seconds] for run, seconds in taken.items()}
        print_times(taken)
        found[name] = in_milliseconds(taken)
    if tiny:
        return found

    T = 4096
    print(f"a training step, GPT-2 124M, 1 x {T:,}; memory above parameters and optimizer state")
    configs = {name: GPTConfig(block_size=T, **SWITCHES[name]) for name in ("modern", "gpt2")}
    memory = {}
    for name, config in configs.items():
        memory[name] = added_mb(step_after_first, config, T, device, bf16)
    runs = {name: (step_as_trained, c, 1, T, device, bf16) for name, c in configs.items()}
    taken = times_apart(runs, repeat=3)
    print_times(taken, {name: f"{mb:,.0f} MB" for name, mb in memory.items()})
    found[f"GPT-2 124M, 1 x {T:,}"] = in_milliseconds(taken)
    found[f"GPT-2 124M, 1 x {T:,}, memory"] = {name: ("MB", [mb]) for name, mb in memory.items()}
    return found


# ----------------------------------------------------------------------------------------------
# start: whole commands, with the data ready

LOSS_OF_NANOGPT = 1.898   # at the end of its CPU recipe
TO_THE_LOSS = f"to a validation loss of {LOSS_OF_NANOGPT}"   # nanoGPT: to its end
NANOGPT_RECIPE = [   # from nanoGPT's README
    "train.py", "config/train_shakespeare_char.py", "--device=cpu", "--compile=False",
    "--eval_iters=20", "--log_interval=1", "--block_size=64", "--batch_size=12", "--n_layer=4",
    "--n_head=4", "--n_embd=128", "--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0",
]


def reaches_loss(line):
    found = re.search(r"validation loss ([\d.]+),", line)   # the comma: ", the best so far"
    return found is not None and float(found[1]) < LOSS_OF_NANOGPT


def prints(text):
    return lambda line: text in line


def seconds_until(reached, folder, command):
    """Run a training command in folder -> seconds until reached(one of its lines) is true"""
    with tempfile.TemporaryDirectory() as out:
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *command, f"--out_dir={out}"],
            cwd=folder,
            env=os.environ | {"PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        try:
            for line in process.stdout:
                if reached(line):
                    return time.perf_counter() - began
        finally:
            process.kill()
            process.wait()
    raise InputError(
        f"the command ended before it came that far: run it in {folder} to see why: "
        f"python {' '.join(command)}"
    )


def start(nanogpt, tiny):
    """Seconds from the command to the first step, and to the loss nanoGPT's recipe ends with"""
    if not Path(ROOT, "data/shakespeare/meta.json").exists():
        prepare("shakespeare", ROOT / "data")
    ours = ["train.py", "config/shakespeare.py"]
    first_step = [*ours, "--eval_iters=1", "--log_interval=1"]
    runs = {
        ("to the first step", "plainGPT"): (prints("step 1/"), ROOT, first_step),
        (TO_THE_LOSS, "plainGPT"): (reaches_loss, ROOT, ours),
    }
    if nanogpt:
        first_step = [*NANOGPT_RECIPE, "--eval_iters=1"]
        runs["to the first step", "nanoGPT"] = (prints("iter 0"), nanogpt, first_step)
        runs[TO_THE_LOSS, "nanoGPT"] = (prints("iter 2000"), nanogpt, NANOGPT_RECIPE)
    taken = {name: [] for name in runs}
    for _ in range(3):
        for name, run in runs.items():
            taken[name].append(seconds_until(*run))
    found = {}
    for (work, who), seconds in taken.items():
        print(f"{work:36} {who:10} {spread(seconds, '.1f', ' s')}")
        found.setdefault(work, {})[who] = ("s", seconds)
    return found


# ----------------------------------------------------------------------------------------------
# decode

NEW_TOKENS = 256


def transformers_run(idx, dtype, config, n):
    """{name: greedy generation by transformers}, empty if it is not installed"""
    try:
        import transformers
    except ImportError:
        print("transformers is not installed: no comparison")
        return {}
    theirs = transformers.GPT2Config(n_layer=config.n_layer, n_embd=config.n_embd)
    model = transformers.GPT2LMHeadModel(theirs).eval().to(idx.device, dtype)

    def run():
        model.generate(
            idx, attention_mask=torch.ones_like(idx), do_sample=False,
            max_new_tokens=n, min_new_tokens=n,
        )
    return {f"transformers {transformers.__version__}": run}


def generation(bytes_per_second, device, config, n):
    """tokens/s of a whole generation, and its share of what reading the weights alone allows"""
    idx = torch.randint(50257, (1, 16), device=device)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = GPT(config).eval().to(device, dtype)
        runs = {"plainGPT": partial(model.generate, idx, n, temperature=0)}
        taken = times(runs | transformers_run(idx, dtype, config, n), repeat=3)
        last = list(taken.values())[-1]
        limit = bytes_per_second / (model.num_params() * dtype.itemsize)
        dtype_name = str(dtype).removeprefix("torch.")
        by_name = {}
        for name, seconds in taken.items():
            speeds = [n / s for s in seconds]
            share = statistics.median(speeds) / limit
            by_name[name] = ("tokens/s", speeds)
            print(
                f"  {dtype_name:9}{name:22} {spread(speeds, '.1f', ' tokens/s')}, {share:.0%}, "
                f"{times_as_fast(seconds, last):.2f} times as fast as the last"
            )
        found[f"greedy decoding, {dtype_name}"] = by_name
    return found


def one_more_token(title, cases, device):
    """cases: {name: (tokens in the cache, batch size, switches)}"""
    runs = {}
    for name, (n, B, switches) in cases.items():
        model = GPT(GPTConfig(block_size=n + ROOM, **switches)).eval().to(device)
        token = torch.randint(50257, (B, 1), device=device)
        runs[name] = partial(model, token, cache=fill(model, n, B))
    taken = times(runs, TOKENS_TIMED)
    print(title)
    print_times(taken)
    return {title: in_milliseconds(taken)}


@torch.no_grad()
def decode(nanogpt, tiny):
    """tokens/s of generation beside transformers, and with fewer key/value heads"""
    device, _, line = machine()
    print(line)
    disable_cudnn_attention()   # as sample.py does
    torch.manual_seed(0)
    config = GPTConfig(n_layer=1, n_embd=48) if tiny else GPTConfig()
    n = 8 if tiny else NEW_TOKENS
    bytes_per_second = memory_speed(device, 10**6) if tiny else memory_speed(device)
    print(
        f"reading memory: {bytes_per_second / 1e9:.1f} GB/s. Greedy, a prompt of 16 tokens, {n} "
        f"new ones; share of what reading the weights alone would allow"
    )
    found = generation(bytes_per_second, device, config, n)
    if tiny:
        return found
    found |= one_more_token("one more token, batch 8, after 4,096, float32", {
        "grouped": (4096, 8, GQA),
        "multi_head": (4096, 8, {}),
    }, device)
    found |= one_more_token("one more token, RoPE and W = 256, batch 1", {
        "after 512": (512, 1, ROPE | SWA),
        "after 4,096": (4096, 1, ROPE | SWA),
    }, device)
    return found


# ----------------------------------------------------------------------------------------------
# processes

MODES = {"alone": (1, []), "DDP": (2, []), "FSDP": (2, ["--fsdp"])}   # processes, flags
MODELS = {
    "config/shakespeare.py": [
        str(ROOT / "config" / "shakespeare.py"), "--optimizer=adamw", "--learning_rate=3e-3",
        "--max_iters=200", "--log_interval=100",
    ],
    "GPT-2 124M, 8 x 256 tokens": [
        "--block_size=256", "--vocab_size=50304", "--batch_size=8", "--micro_batch_size=2",
        "--warmup_iters=0", "--max_iters=2", "--log_interval=1",
    ],
}
ALWAYS = [
    "--dataset=text", "--device=cpu", "--dtype=float32", "--eval_iters=1",
    "--eval_interval=1000000", "--checkpoint_interval=1000000",
]


def run_in_mode(program, mode, flags, folder):
    """Run train.py or held.py in folder, the machine's threads shared out -> what it printed"""
    n, mode_flags = MODES[mode]
    launcher = [sys.executable]
    if n > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
    environment = {
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": str(threads_each(n)),
    }
    done = subprocess.run(
        [*launcher, *program, *flags, *mode_flags, *ALWAYS],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        raise InputError(f"{mode} failed: what it said stands above")
    return done.stdout


def threads_each(n):
    return max(1, torch.get_num_threads() // n)


def tokens_per_second(mode, flags, folder):
    """The last figure that train.py prints. Its checkpoints are deleted: some GB for GPT-2."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        printed = run_in_mode(["-m", "train"], mode, [*flags, f"--out_dir={out}"], folder)
    return float(re.findall(r"([\d,]+) tokens/s", printed)[-1].replace(",", ""))


FIRST_RANK = '{"rank": 0,'   # how held.py's line of it begins


def bytes_held(mode, flags, folder):
    """What the first process holds, in words"""
    printed = run_in_mode(["-m", "assessment.held"], mode, flags, folder)
    held = json.loads(next(line for line in printed.splitlines() if line.startswith(FIRST_RANK)))
    return (
        f"{held['parameters'] / 1e6:.0f} MB of parameters, "
        f"{held['gradients'] / 1e6:.0f} of gradients, "
        f"{held['optimizer'] / 1e6:.0f} of optimizer state"
    )


def processes(nanogpt, tiny):
    """train.py alone, as DDP and as FSDP: tokens/s, and the bytes that the first process holds"""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        sources = [*ROOT.glob("*.py"), *ROOT.glob("plumbing/*.py")]
        prepare_text(Path(folder, "data/text"), sources, "char")
        for name, flags in MODELS.items():
            speeds = {mode: [] for mode in MODES}
            for _ in range(3):
                for mode in MODES:
                    speeds[mode].append(tokens_per_second(mode, flags, folder))
            print(name)
            found[name] = {mode: ("tokens/s", values) for mode, values in speeds.items()}
            for mode, (n, _) in MODES.items():
                ratio = statistics.median(speeds[mode]) / statistics.median(speeds["alone"])
                held = bytes_held(mode, flags, folder)
                print(
                    f"  {mode:6}{n} x {threads_each(n)} thread(s)  "
                    f"{spread(speeds[mode], ',.0f', ' tokens/s')}  {ratio:.2f} of alone; "
                    f"holds {held}"
                )
    return found


# ----------------------------------------------------------------------------------------------
# profile

KINDS = {   # of operations, by words in the names that torch gives them; the first that fits counts
    "loss": ("log_softmax", "nll_loss"),
    "attention": ("attention", "softmax_backward", "aten::_softmax"),
    "optimizer": ("adamw", "foreach", "vector_norm"),
    "matrix products": ("::mm", "addmm", "bmm", "linear"),
    "casts and copies": ("copy_", "cat", "_to_copy"),
    "GELU and LayerNorm": ("gelu", "layer_norm"),
}


def kind_of(operation):
    for kind, words in KINDS.items():
        if any(word in operation for word in words):
            return kind
    return "the rest"


def products_per_second(dtype, n):
    """FLOP/s of the product of two n x n matrices"""
    a, b = torch.randn(2, n, n).to(dtype)
    return 2 * n**3 / min(times({"product": lambda: a @ b}, repeat=5)["product"])


def profile(nanogpt, tiny):
    """Where a training step's time goes, and the least that its matrix products could take"""
    return in_new_process(profile_here, tiny)


def profile_here(tiny):
    device, bf16, line = machine()
    print(line)
    B, T, _, shape = (2, 32, 1, TINY) if tiny else SHAPES["GPT-2 124M, 2 x 512"]
    config = GPTConfig(**shape)
    step = step_as_trained(config, B, T, device, bf16)
    seconds = statistics.median(times({"step": step}, repeat=3)["step"])
    n = 3
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        repeated(step, n)()
    spent = {}
    for event in profiler.key_averages():
        kind = kind_of(event.key)
        spent[kind] = spent.get(kind, 0) + event.self_cpu_time_total / 1e3 / n
    print(f"a training step of {B} x {T} tokens: {1e3 * seconds:,.1f} ms; under the profiler, ms:")
    for kind, ms in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"  {kind:20} {ms:8,.1f}")
    with torch.device("meta"):
        flops = B * T * GPT(config).flops_per_token(1)   # attention's products left out
    dtype = torch.bfloat16 if bf16 else torch.float32
    size = 64 if tiny else 2048
    speed = products_per_second(dtype, size)
    print(f"its products outside attention are {flops / 1e9:,.0f} GFLOP; at the {speed / 1e9:,.0f} "
          f"GFLOP/s of two {size} x {size} matrices they would take {1e3 * flops / speed:,.1f} ms")
    return {"profile": {kind: ("ms", [ms]) for kind, ms in spent.items()}}


# ----------------------------------------------------------------------------------------------
# The command

PARTS = {"steps": steps, "start": start, "decode": decode, "processes": processes,
         "profile": profile}
BESIDE_NANOGPT = ("steps", "start")
WHOLE_COMMANDS = ("start", "processes")   # not made tiny, and on the CPU
COLUMNS = ("part", "hardware", "work", "who", "unit", "median", "low", "high")


def write_csv(part, described, found):
    """{work: {who: (unit, values)}} -> speed.csv, in place of what it had of this part"""
    rows = [tuple(row.values()) for row in read_results("speed.csv") if row["part"] != part]
    for work, runs in found.items():
        for who, (unit, values) in runs.items():
            numbers = statistics.median(values), min(values), max(values)
            rows.append((part, described, work, who, unit, *(f"{x:.6g}" for x in numbers)))
    write_results("speed.csv", COLUMNS, rows)


def obstacle(part, nanogpt, tiny, keep):
    """Why a part cannot be measured so, or None"""
    if tiny and part in WHOLE_COMMANDS:
        return f"the part {part} times whole commands, which are not made tiny: leave out --tiny"
    if part == "profile" and torch.cuda.is_available():
        return "the part profile is for CPUs: hide the GPU with CUDA_VISIBLE_DEVICES="
    if keep and part in BESIDE_NANOGPT and not nanogpt:
        return (f"--csv replaces the figures of {part} beside nanoGPT's, so it needs "
                "--nanogpt=FOLDER, a clone of nanoGPT")
    if keep and part == "decode" and not importlib.util.find_spec("transformers"):
        return ("--csv replaces the figures of decode beside those of transformers, which is not "
                "installed: pip install -r requirements-dev.txt")
    return None


def read_command_line(argv):
    """-> the parts to measure, nanoGPT's folder or None, tiny, keep"""
    named = []
    nanogpt = None
    tiny = keep = False
    for word in argv:
        if word.startswith("--nanogpt="):
            nanogpt = Path(word.removeprefix("--nanogpt=")).resolve()
            if not (nanogpt / "model.py").exists():
                raise InputError(f"{word}: no model.py there; give a clone of nanoGPT's repository")
        elif word in PARTS:
            named.append(word)
        elif word == "--tiny":
            tiny = True
        elif word == "--csv":
            keep = True
        else:
            raise InputError(
                f"speed {word}: unknown; choose from {', '.join(PARTS)}, or name none to run all; "
                "--nanogpt=FOLDER is a clone of nanoGPT; --csv keeps the figures; --tiny only "
                "shows that it works"
            )
    if keep and tiny:
        raise InputError("speed: --csv keeps figures, and those of --tiny mean nothing")
    parts = []
    for part in named or PARTS:
        why_not = obstacle(part, nanogpt, tiny, keep)
        if not why_not:
            parts.append(part)
        elif named:
            raise InputError(f"speed: {why_not}")
        else:
            print(f"left out: {why_not}")
    return parts, nanogpt, tiny, keep


def main(argv):
    parts, nanogpt, tiny, keep = read_command_line(argv)
    print_versions()
    for part in parts:
        described = hardware(gpu=part not in WHOLE_COMMANDS) if keep else ""
        found = PARTS[part](nanogpt, tiny)
        if keep:
            write_csv(part, described, found)
