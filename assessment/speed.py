"""How fast it is: training steps, start-up, decoding, and several processes."""

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
from pathlib import Path

import torch

from assessment.cost import GQA, ROPE, SWA, VARIANTS, fill
from assessment.measure import (
    ROOT,
    added_mb,
    machine,
    nanogpt_step,
    print_times,
    print_versions,
    spread,
    step_after_first,
    times,
    times_as_fast,
    training_step,
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


def repeated(f, n):
    def run():
        for _ in range(n):
            f()
    return run


def steps(nanogpt, tiny):
    """A training step beside nanoGPT's, and of long texts with and without the switches"""
    device, bf16, line = machine()
    print(line)
    shapes = {"a tiny model": (2, 32, 1, TINY)} if tiny else SHAPES
    for name, (B, T, n, shape) in shapes.items():
        runs = {"plainGPT": training_step(GPT(GPTConfig(**shape)), B, T, device, bf16)}
        if nanogpt:
            runs["nanoGPT"] = nanogpt_step(nanogpt_model(nanogpt, shape), B, T, device, bf16)
        taken = times({run: repeated(step, n) for run, step in runs.items()}, repeat=5)
        print(f"a training step, {name}")
        print_times({run: [s / n for s in seconds] for run, seconds in taken.items()})
    if tiny:
        return

    T = 4096
    print(f"a training step, GPT-2 124M, 1 x {T:,}; memory above parameters and optimizer state")
    configs = {name: GPTConfig(block_size=T, **VARIANTS[name]) for name in ("modern", "gpt2")}
    memory = {}
    for name, config in configs.items():
        memory[name] = f"{added_mb(step_after_first, config, T, device, bf16):,.0f} MB"
    runs = {name: training_step(GPT(c), 1, T, device, bf16) for name, c in configs.items()}
    print_times(times(runs, repeat=3), memory)


# ----------------------------------------------------------------------------------------------
# start: whole commands, with the data ready

LOSS_OF_NANOGPT = 1.898   # at the end of its CPU recipe
NANOGPT_RECIPE = [   # from nanoGPT's README
    "train.py", "config/train_shakespeare_char.py", "--device=cpu", "--compile=False",
    "--eval_iters=20", "--log_interval=1", "--block_size=64", "--batch_size=12", "--n_layer=4",
    "--n_head=4", "--n_embd=128", "--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0",
]


def reaches_loss(line):
    found = re.search(r"validation loss ([\d.]+),", line)
    return found is not None and float(found[1]) < LOSS_OF_NANOGPT


def prints(text):
    return lambda line: text in line


def seconds_until(reached, folder, command):
    """Run a training command in folder -> seconds until reached(one of its lines) is true"""
    with tempfile.TemporaryDirectory() as out:
        start = time.perf_counter()
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
                    return time.perf_counter() - start
        finally:
            process.kill()
            process.wait()
    raise InputError(
        f"the command ended before it came that far: run it in {folder} to see why: "
        f"python {' '.join(command)}"
    )


def start(nanogpt, tiny):
    """Seconds from the command to the first step, and to the loss nanoGPT's recipe ends with"""
    if tiny:
        raise InputError("speed start times whole commands, which are not made tiny")
    if not Path(ROOT, "data/shakespeare/meta.json").exists():
        prepare("shakespeare", ROOT / "data")
    ours = ["train.py", "config/shakespeare.py"]
    first_step = [*ours, "--eval_iters=1", "--log_interval=1"]
    runs = {
        "to the first step": (prints("step 1/"), ROOT, first_step),
        f"to a validation loss below {LOSS_OF_NANOGPT}": (reaches_loss, ROOT, ours),
    }
    if nanogpt:
        first_step = [*NANOGPT_RECIPE, "--eval_iters=1"]
        runs["to the first step, nanoGPT"] = (prints("iter 0"), nanogpt, first_step)
        runs["to the end, nanoGPT"] = (prints("iter 2000"), nanogpt, NANOGPT_RECIPE)
    found = {name: [] for name in runs}
    for _ in range(3):
        for name, run in runs.items():
            found[name].append(seconds_until(*run))
    for name, seconds in found.items():
        print(f"{name:36} {spread(seconds, '.1f', ' s')}")


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
    for dtype in (torch.float32, torch.bfloat16):
        model = GPT(config).eval().to(device, dtype)
        runs = {"plainGPT": lambda m=model: m.generate(idx, n, temperature=0)}
        taken = times(runs | transformers_run(idx, dtype, config, n), repeat=3)
        last = list(taken.values())[-1]
        limit = bytes_per_second / (model.num_params() * dtype.itemsize)
        dtype_name = str(dtype).removeprefix("torch.")
        for name, seconds in taken.items():
            speeds = [n / s for s in seconds]
            share = statistics.median(speeds) / limit
            print(
                f"  {dtype_name:9}{name:22} {spread(speeds, '.1f', ' tokens/s')}, {share:.0%}, "
                f"{times_as_fast(seconds, last):.2f} times the last"
            )


def one_more_token(title, cases, device):
    """cases: {name: (tokens in the cache, batch size, switches)}"""
    runs = {}
    for name, (n, B, switches) in cases.items():
        model = GPT(GPTConfig(block_size=n + 64, **switches)).eval().to(device)
        cache = fill(model, n, B)
        token = torch.randint(50257, (B, 1), device=device)
        runs[name] = lambda m=model, c=cache, t=token: m(t, cache=c)
    taken = times(runs, repeat=25)
    print(title)
    print_times(taken)


@torch.no_grad()
def decode(tiny):
    """tokens/s of generation beside transformers, and with fewer key/value heads"""
    device, _, line = machine()
    print(line)
    disable_cudnn_attention()   # as sample.py does
    torch.manual_seed(0)
    config = GPTConfig(n_layer=1, n_embd=48) if tiny else GPTConfig()
    n = 8 if tiny else NEW_TOKENS
    weights = torch.ones(10**6 if tiny else 124_439_808, device=device)
    taken = times({"read": weights.sum}, repeat=9)["read"]
    bytes_per_second = weights.nbytes / min(taken)
    print(
        f"reading memory: {bytes_per_second / 1e9:.1f} GB/s. GPT-2 124M, greedy, a prompt of 16 "
        f"tokens, {n} new ones; share of what reading the weights alone would allow"
    )
    generation(bytes_per_second, device, config, n)
    if tiny:
        return
    one_more_token("one more token, batch 8, after 4,096, float32", {
        "grouped": (4096, 8, GQA),
        "multi_head": (4096, 8, {}),
    }, device)
    one_more_token("one more token, RoPE and W = 256, batch 1", {
        "after 512": (512, 1, ROPE | SWA),
        "after 4,096": (4096, 1, ROPE | SWA),
    }, device)


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
        raise InputError(f"{mode} failed: {done.stderr.strip()}")
    return done.stdout


def threads_each(n):
    return max(1, torch.get_num_threads() // n)


def tokens_per_second(mode, flags, folder):
    """The last figure that train.py prints. Its checkpoints are deleted: some GB for GPT-2."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        printed = run_in_mode(["-m", "train"], mode, [*flags, f"--out_dir={out}"], folder)
    return float(re.findall(r"([\d,]+) tokens/s", printed)[-1].replace(",", ""))


def bytes_held(mode, flags, folder):
    """What the first process holds, in words"""
    printed = run_in_mode(["-m", "assessment.held"], mode, flags, folder)
    for line in printed.splitlines():
        if line.startswith('{"rank": 0,'):
            held = json.loads(line)
    return (
        f"{held['parameters'] / 1e6:.0f} MB of parameters, "
        f"{held['gradients'] / 1e6:.0f} of gradients, "
        f"{held['optimizer'] / 1e6:.0f} of optimizer state"
    )


def processes(tiny):
    """train.py alone, as DDP and as FSDP: tokens/s, and the bytes that the first process holds"""
    if tiny:
        raise InputError("speed processes times whole commands, which are not made tiny")
    with tempfile.TemporaryDirectory() as folder:
        sources = [*ROOT.glob("*.py"), *ROOT.glob("plumbing/*.py")]
        prepare_text(Path(folder, "data/text"), sources, "char")
        for name, flags in MODELS.items():
            speeds = {mode: [] for mode in MODES}
            for _ in range(3):
                for mode in MODES:
                    speeds[mode].append(tokens_per_second(mode, flags, folder))
            print(name)
            for mode, (n, _) in MODES.items():
                ratio = statistics.median(speeds[mode]) / statistics.median(speeds["alone"])
                print(
                    f"  {mode:6}{n} x {threads_each(n)} thread(s)  "
                    f"{spread(speeds[mode], ',.0f', ' tokens/s')}  {ratio:.2f} of alone; "
                    f"holds {bytes_held(mode, flags, folder)}"
                )


# ----------------------------------------------------------------------------------------------
# The command

PARTS = {"steps": steps, "start": start, "decode": decode, "processes": processes}
BESIDE_NANOGPT = ("steps", "start")


def main(argv):
    parts = []
    nanogpt = None
    tiny = False
    for word in argv:
        if word.startswith("--nanogpt="):
            nanogpt = Path(word.removeprefix("--nanogpt=")).resolve()
            if not (nanogpt / "model.py").exists():
                raise InputError(f"{word}: no model.py there; give a clone of nanoGPT's repository")
        elif word in PARTS:
            parts.append(word)
        elif word == "--tiny":
            tiny = True
        else:
            raise InputError(
                f"speed {word}: unknown; choose from {', '.join(PARTS)}, or name none to run all; "
                "--nanogpt=FOLDER is a clone of nanoGPT"
            )
    print_versions()
    for part in parts or PARTS:
        if part in BESIDE_NANOGPT:
            PARTS[part](nanogpt, tiny)
        else:
            PARTS[part](tiny)
