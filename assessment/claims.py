"""
What the papers claim, in miniature: short trainings by train.py, three seeds of each, whose losses
go into results/papers.csv.
"""

import csv
import io
import random
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

import train
from assessment.measure import (
    RESULTS,
    ROOT,
    cpu_only,
    in_new_process,
    machine,
    print_versions,
    read_results,
)
from model import GPT
from plumbing.checkpoints import load_checkpoint
from plumbing.errors import InputError
from plumbing.files import replacing
from plumbing.token_files import Data, load_meta
from prepare_data import prepare, prepare_text

# 2,048 tokens per step; 480 sequences of 128 tokens per evaluation
SMALL = [
    str(ROOT / "config" / "shakespeare.py"), "--device=cpu",
    "--n_layer=4", "--n_head=8", "--n_embd=128", "--block_size=128", "--dropout=0",
    "--batch_size=16", "--micro_batch_size=16", "--max_iters=300",
    "--optimizer=muon", "--learning_rate=1.5e-2", "--warmup_iters=40",
    "--eval_interval=100", "--eval_iters=30", "--log_interval=50",
]
SEEDS = (1, 2, 3)

# The flags of each variant
ROPE = ["--use_rope"]
HEADS = {f"kv{n}": ["--use_gqa", f"--n_kv_head={n}"] for n in (4, 2, 1)}
WINDOWS = {f"W{w}": ["--use_swa", f"--window_size={w}"] for w in (8, 16, 32, 64)}
WINDOWS["growing"] = ["--use_swa", "--window_size=(8,24,40,56)"]
WINDOWS["shrinking"] = ["--use_swa", "--window_size=(56,40,24,8)"]
MODERN = ROPE + HEADS["kv2"] + WINDOWS["W32"]
FLAGS = {
    "gpt2": [],
    "rope": ROPE,
    **HEADS,
    **WINDOWS,
    "rope+W4": [*ROPE, "--use_swa", "--window_size=4"],
    "rope+W8": ROPE + WINDOWS["W8"],
    "rope+W16": ROPE + WINDOWS["W16"],
    "rope+W32": ROPE + WINDOWS["W32"],
    "rope+hybrid": [*ROPE, "--use_swa", "--window_size=(4,0,4,0)"],
    "modern": MODERN,
    "modern 540 steps": [*MODERN, "--max_iters=540"],
}


class Part(NamedTuple):
    experiment: str    # the first column of its rows
    data: tuple
    variants: tuple
    flags: list = []   # besides those of the variant


# A job of the experiment "train" may belong to several parts; it is trained once.
TEXTS = ("shakespeare", "stdlib")
ONE_LONG = ["--block_size=1024", "--batch_size=2", "--micro_batch_size=2"]
RECALLING = ("rope+W4", "rope+W8", "rope+W16", "rope+W32", "rope+hybrid", "rope")
PARTS = {
    "rope": Part("train", TEXTS, ("gpt2", "rope", "rope+W32", "modern")),
    "gqa": Part("train", TEXTS, ("gpt2", *HEADS)),
    "windows": Part("train", TEXTS, ("gpt2", *WINDOWS)),
    "recall": Part("recall", ("recall",), RECALLING),
    "longer": Part("longer", ("stdlib",), ("gpt2", "rope", "W8"), ["--max_iters=900"]),
    "time": Part("time", ("stdlib",), ("gpt2", "modern", "modern 540 steps"), ONE_LONG),
}

LENGTHS = (128, 256, 512, 1024)   # characters read at once by models trained on 128
CONVERSIONS = ("mean", "first", "random")
# The value is a validation loss in nats per token; for the experiment "seconds" it is seconds.
COLUMNS = ("experiment", "data", "variant", "seed", "step", "length", "value")


class Job(NamedTuple):
    """One training, and all that is looked up with its result"""
    experiment: str
    data: str
    variant: str
    seed: int


# ----------------------------------------------------------------------------------------------
# One job, in a process of its own with one thread

def rows_of_job(job, flags, dtype, folder):
    """Train, and look -> rows, see COLUMNS"""
    torch.set_num_threads(1)
    flags = [*flags, f"--dtype={dtype}", f"--dataset={job.data}", f"--seed={job.seed}"]
    out = Path(folder, "-".join(map(str, job)))
    length = 1024 if job.experiment == "time" else 128
    rows = []
    for step, (loss, seconds) in train_quietly(out, flags).items():
        rows.append((*job, step, length, loss))
        if job.experiment == "time":   # the other experiments do not compare times
            rows.append(("seconds", *job[1:], step, length, seconds))
    if job.experiment == "train" and "--use_rope" in flags:
        for T in LENGTHS:
            rows.append(("length", *job[1:], 300, T, loss_at_length(out, job.data, T)))
    if job.experiment == "train" and job.variant == "gpt2":
        rows += uptrain(job, out, flags)
    return rows


def train_quietly(out, flags):
    """train.py into the folder out -> {step: (validation loss, seconds of training until then)}"""
    flags = [*SMALL, *flags, f"--out_dir={out}"]
    with redirect_stdout(io.StringIO()):
        train.main(flags)
    points = {}
    seconds = 0.0
    tokens = 0
    with open(out / "metrics.csv", encoding="utf-8", newline="") as f:
        for row in csv.DictReader(f):
            if row["tokens_per_s"]:
                seconds += (int(row["tokens"]) - tokens) / int(row["tokens_per_s"])
                tokens = int(row["tokens"])
            if row["val_loss"]:
                points[int(row["step"])] = float(row["val_loss"]), seconds
    if train.load_config(flags)[0].max_iters not in points:
        raise InputError(f"{out.name} was stopped before its last step")
    return points


@torch.no_grad()
def loss_at_length(out, data_name, T):
    """
    Validation loss on the last 64 of every 1,024 characters, read together with the T - 64 before
    them: the same 64 for every T
    """
    longer = {"block_size": T} if T > 128 else {}
    model = GPT.from_pretrained(out / "ckpt.pt", **longer)
    folder = Path("data") / data_name
    data = Data(folder, load_meta(folder), "val", max(LENGTHS), seed=0)
    losses = []
    for i in range(100):
        x, y = data.sequences([i])
        y[:, :-64] = -1
        losses.append(model(x[:, -T:], y[:, -T:])[1].item())
    return statistics.mean(losses)


def uptrain(job, out, flags):
    """
    Convert a multi-head model to fewer key/value heads, and train it for 5% and 10% of the steps
    at a third of the learning rate (GQA, section 2.1). -> rows
    """
    more = ["--max_iters=30", "--eval_interval=15", "--warmup_iters=0", "--learning_rate=5e-3"]
    rows = []

    def train_from(source, variant, *heads):
        target = Path(f"{source}-more")
        points = train_quietly(target, [*flags, f"--init_from={source}", *heads, *more])
        for step, (loss, _) in points.items():
            rows.append(("convert", job.data, variant, job.seed, step, 128, loss))

    for n in (2, 1):
        for how in CONVERSIONS:
            converted = Path(f"{out}-{how}-{n}")
            convert(out, converted, how, n)
            train_from(converted, f"kv{n} {how}", *HEADS[f"kv{n}"])
    train_from(out, "multi-head")
    return rows


def convert(source, target, how, n_kv_head):
    """
    Write the last checkpoint in source to target, with n_kv_head key/value heads: each is the mean
    or the first of those it replaces, or random.
    """
    path = source / "ckpt.pt"
    checkpoint = load_checkpoint(path)
    multi_head = GPT.from_pretrained(path)
    grouped = GPT.from_pretrained(path, use_gqa=True, n_kv_head=n_kv_head)   # the mean
    H = multi_head.config.n_head
    C = multi_head.config.n_embd
    K = n_kv_head
    D = C // H
    for block, old_block in zip(grouped.h, multi_head.h, strict=True):
        keys_values = block.attn.c_attn.weight.data[C:].view(2, K, D, C)
        if how == "first":
            old = old_block.attn.c_attn.weight.data[C:].view(2, K, H // K, D, C)
            keys_values.copy_(old[:, :, 0])
        if how == "random":
            torch.nn.init.normal_(keys_values, std=0.02)
    target.mkdir()
    changed = {"model": grouped.state_dict(), "gpt_config": asdict(grouped.config)}
    torch.save(checkpoint | changed, target / "best.pt")


# ----------------------------------------------------------------------------------------------
# All jobs

def jobs_of(parts):
    """Names of parts -> {Job: flags}"""
    jobs = {}
    for part in parts:
        experiment, texts, variants, flags = PARTS[part]
        for data in texts:
            for variant in variants:
                for seed in SEEDS:
                    jobs[Job(experiment, data, variant, seed)] = [*FLAGS[variant], *flags]
    return jobs


def job_of(row):
    """The Job that a row of papers.csv comes from"""
    origins = {"length": "train", "convert": "train", "seconds": "time"}
    experiment = origins.get(row["experiment"], row["experiment"])
    variant = "gpt2" if row["experiment"] == "convert" else row["variant"]
    return Job(experiment, row["data"], variant, int(row["seed"]))


def recall_text():
    """Lines of 24 random letters, each twice: who sees 25 characters back can know the second."""
    rng = random.Random(0)
    lines = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=24)) + "\n" for _ in range(48_000)]
    return "".join(2 * line for line in lines)


def prepare_texts(names, folder, recall):
    """recall: the text of the dataset of that name, which is made anew each time"""
    for name in names:
        if name == "recall":
            text = Path(folder, "recall.txt")
            text.write_text(recall, encoding="utf-8", newline="\n")
            prepare_text(Path("data/recall"), [text], "char")
        elif not Path("data", name, "meta.json").exists():
            prepare(name)


def write_rows(results):
    """{Job: rows} -> papers.csv, in the order of PARTS"""
    lines = [",".join(COLUMNS)]
    for job in jobs_of(PARTS):
        for row in results.get(job, []):
            lines.append(",".join(map(str, row)))
    RESULTS.mkdir(exist_ok=True)
    with replacing(RESULTS / "papers.csv") as f:
        f.write(("\n".join(lines) + "\n").encode())


def train_all(jobs, results, dtype, folder):
    """Train {Job: flags}, one per thread at a time; their rows go into results and papers.csv."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        try:
            futures = {}
            for job, flags in jobs.items():
                futures[job] = pool.submit(
                    in_new_process, rows_of_job, job, flags, dtype, folder
                )
            for i, (job, future) in enumerate(futures.items(), 1):
                rows = future.result()
                results[job] = [(*row[:-1], f"{row[-1]:.4f}") for row in rows]
                write_rows(results)
                losses = [row[-1] for row in rows if row[0] == job.experiment]
                name = " ".join(map(str, job))
                print(f"{i} of {len(jobs)}: {name} {losses[0]:.4f} to {losses[-1]:.4f}")
        finally:
            pool.shutdown(cancel_futures=True)   # Ctrl-C reaches the jobs under way, too


def print_means():
    """Means over the seeds, with the smallest and largest"""
    groups = {}
    for row in read_results("papers.csv"):
        key = ", ".join(row[column] for column in COLUMNS if column not in ("seed", "value"))
        groups.setdefault(key, []).append(float(row["value"]))
    print("experiment, data, variant, step, length: mean over the seeds (smallest to largest)")
    for key, values in groups.items():
        mean = statistics.mean(values)
        print(f"  {key:58} {mean:7.3f} ({min(values):.3f} to {max(values):.3f})")


def main(parts):
    """Run the parts, all by default. Their rows replace those in papers.csv; the others stay."""
    for part in parts:
        if part not in PARTS:
            raise InputError(
                f"claims {part}: unknown part; choose from {', '.join(PARTS)}, "
                "or name none to run all"
            )
    print_versions()
    cpu_only()
    _, bf16, line = machine()
    print(line)
    dtype = "bfloat16" if bf16 else "float32"   # decided once, for all jobs
    jobs = jobs_of(parts or PARTS)
    results = {}
    for row in read_results("papers.csv"):
        results.setdefault(job_of(row), []).append(tuple(row.values()))
    with tempfile.TemporaryDirectory() as folder:
        prepare_texts(sorted({job.data for job in jobs}), folder, recall_text())
        train_all(jobs, results, dtype, folder)
    print_means()
