"""
The commands to run first on a new GPU, and what they print about speed, memory and losses:
results/gpu.csv, and everything in results/gpu.log. Without a GPU the same commands run with tiny
models, to see that they work.
"""

import csv
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import sample
from assessment.measure import RESULTS, ROOT, print_versions
from plumbing.errors import InputError

PYTHON = [sys.executable]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
# Steps of GPT-2's size on a text that is on every machine: their speed does not depend on the text.
TEXT = ["--dataset=stdlib", "--eval_iters=1", "--eval_interval=1000", "--log_interval=10"]
STEPS = ["--batch_size=128", "--max_iters=50", *TEXT]
TINY = [
    "--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=4",
    "--micro_batch_size=2", "--max_iters=2", "--warmup_iters=0", "--eval_iters=1",
    "--log_interval=1", "--compile=False",
]

# What a command prints: name, and where the number stands; the last one counts
FIGURES = {
    "tokens/s": r"([\d,.]+) tokens/s",
    "MFU %": r"MFU ([\d.]+)%",
    "validation loss": r"the best ([\d.]+), in",
    "memory GB": r"peak memory of this GPU: ([\d.]+) GB",
    "time of the run": r"the best [\d.]+, in (\w+)",
}


def commands(out):
    """[(name, command)], the important ones first; out: a folder for what they write"""
    train = [*PYTHON, "train.py"]
    shakespeare = [*train, "config/shakespeare.py", "--dataset=shakespeare"]   # no substitute
    assessment = [*PYTHON, "-m", "assessment"]
    small = [*TORCHRUN, "train.py", "config/gpt2.py", *STEPS, "--vocab_size=50304"]
    large = [*TORCHRUN, "train.py", "config/gpt2_large.py", *TEXT, "--vocab_size=50304"]
    text = [f"--init_from={out}/50304-16", "--max_new_tokens=500", "--temperature=0"]
    listed = [
        ("shakespeare", [*shakespeare, f"--out_dir={out}/shakespeare"]),
        ("shakespeare, all switches",
         [*shakespeare, "config/modern.py", f"--out_dir={out}/modern"]),
    ]
    for vocab_size in (50257, 50304):
        for micro in (16, 64):
            listed.append((
                f"GPT-2 124M, vocabulary {vocab_size}, micro-batch {micro}",
                [*train, "config/gpt2.py", *STEPS, f"--vocab_size={vocab_size}",
                 f"--micro_batch_size={micro}", f"--out_dir={out}/{vocab_size}-{micro}"],
            ))
    return listed + [
        ("sampling, bfloat16", [*PYTHON, "sample.py", "--dtype=bfloat16", *text]),
        ("the same with cuDNN",
         [*assessment, "gpu", "sample-with-cudnn", "--dtype=bfloat16", *text]),
        ("GPT-2 124M, all switches", [*train, "config/gpt2.py", "config/modern.py", *STEPS,
                                      "--window_size=256", "--vocab_size=50304",
                                      f"--out_dir={out}/all"]),
        ("GPT-2 124M, DDP", [*small, f"--out_dir={out}/ddp"]),
        ("GPT-2 124M, FSDP", [*small, "--fsdp", f"--out_dir={out}/fsdp"]),
        ("GPT-2 774M, FSDP", [*large, "--fsdp", "--max_iters=10", f"--out_dir={out}/large"]),
        ("beside nanoGPT", [*assessment, "speed", "steps"]),
        ("beside transformers", [*assessment, "speed", "decode"]),
        ("cost", [*assessment, "cost"]),
    ]


def tiny(command):
    """The same command for a machine without a GPU"""
    if "train.py" in command:
        return [*command, *TINY]
    if command[-1] in ("steps", "decode", "cost"):
        return [*command, "--tiny"]
    return [*command, "--max_new_tokens=5"]


def run(name, command, log):
    """Run a command -> [(name, what, number)] of what it printed. All of that goes to log."""
    start = time.perf_counter()
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"TORCH_LOGS": "recompiles,graph_breaks", "PYTHONIOENCODING": "utf-8"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    print(f"$ {' '.join(command)}\n{done.stdout}", file=log, flush=True)
    rows = [(name, "exit status", done.returncode)]
    printed = FIGURES
    if command[-1] in ("steps", "decode", "cost", "--tiny"):   # tables: they are in the log
        printed = {}
    for what, pattern in printed.items():
        found = re.findall(pattern, done.stdout)
        if found:
            rows.append((name, what, found[-1].replace(",", "")))
    rows.append((name, "recompilations", done.stdout.count("Recompiling function")))
    rows.append((name, "graph breaks", done.stdout.count("Graph break")))
    rows.append((name, "seconds in all", f"{time.perf_counter() - start:.0f}"))
    return rows


def main(argv):
    """argv: --nanogpt=FOLDER, a clone of nanoGPT to measure beside"""
    if argv[:1] == ["sample-with-cudnn"]:
        sample.disable_cudnn_attention = lambda: None
        sample.main(argv[1:])
        return
    print_versions()
    has_gpu = torch.cuda.is_available()
    card = torch.cuda.get_device_name() if has_gpu else "no GPU"
    results = RESULTS / "gpu.csv"
    if not has_gpu:
        print("no CUDA GPU here: the same commands with tiny models, to see that they work")
        results = Path("gpu-tiny.csv")
    failed = []
    with (
        tempfile.TemporaryDirectory() as out,
        open(results, "w", encoding="utf-8", newline="") as f,
        open(results.with_suffix(".log"), "w", encoding="utf-8") as log,
    ):
        f.write(f"# torch {torch.__version__}, {card}\n")
        table = csv.writer(f, lineterminator="\n")
        table.writerow(("command", "what", "value"))
        for name, command in commands(out):
            if not has_gpu:
                command = tiny(command)
            if name == "beside nanoGPT":
                command = [*command, *argv]
            rows = run(name, command, log)
            table.writerows(rows)
            f.flush()
            if rows[0][2] != 0:
                failed.append(name)
            print(f"{name}: {', '.join(f'{what} {value}' for _, what, value in rows)}", flush=True)
    print(f"written: {results}; what the commands printed: {results.with_suffix('.log')}")
    if failed:
        raise InputError(f"failed: {', '.join(failed)}; the log has what they printed")
