"""
What the papers claim, in miniature: small models, trained by train.py from several seeds. What is
measured goes into results/claims.csv, a row each; a run whose rows are there is not made again.
"""

import csv
import io
import itertools
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import torch

import train
from assessment.measure import (
    RESULTS,
    cpu_only,
    in_new_process,
    machine,
    print_versions,
    read_results,
)
from assessment.small_models import (
    SMALL,
    at_other_lengths,
    recall_text,
    recalled,
    train_quietly,
    uptrained,
    written,
)
from plumbing.errors import InputError
from plumbing.files import replacing
from prepare_data import prepare, prepare_text

COLUMNS = ("part", "data", "variant", "seed", "measure", "step", "length", "value")

ROPE = ["--use_rope"]
GQA = ["--use_gqa", "--n_kv_head=2"]
SWA = ["--use_swa", "--window_size=32"]
RATES = ("5e-3", "1e-2", "1.5e-2", "2e-2", "3e-2")   # with Muon
ADAMW_RATES = ("2e-3", "4e-3", "8e-3")
VARIANTS = {"gpt2": [], "rope": ROPE, "gqa": GQA, "swa": SWA, "modern": ROPE + GQA + SWA}


class Job(NamedTuple):
    """One training, and all that is looked up with its result"""
    part: str
    data: str
    variant: str
    seed: int


class Part(NamedTuple):
    data: str
    variants: dict           # {variant: flags}
    seeds: int = 3
    flags: tuple = ()        # of all variants
    look: object = None      # look(job, out, flags) -> rows beside the losses, (measure, ...)


# ----------------------------------------------------------------------------------------------
# The parts

def rates():
    """Each variant at several learning rates, and two of them with AdamW"""
    found = {}
    for name, switches in VARIANTS.items():
        for rate in RATES:
            found[f"{name} muon {rate}"] = [*switches, f"--learning_rate={rate}"]
    for name, rate in itertools.product(("gpt2", "rope"), ADAMW_RATES):
        adamw = ["--optimizer=adamw", f"--learning_rate={rate}"]
        found[f"{name} adamw {rate}"] = VARIANTS[name] + adamw
    return found


def factorial():
    """All combinations of the three switches"""
    found = {}
    for names in itertools.product(("", "rope"), ("", "gqa"), ("", "swa")):
        chosen = [name for name in names if name]
        flags = [flag for name in chosen for flag in VARIANTS[name]]
        found["+".join(chosen) or "gpt2"] = flags
    return found


WINDOWS = {
    "8": ["--use_swa", "--window_size=8"],
    "growing": ["--use_swa", "--window_size=(8,24,40,56)"],
    "shrinking": ["--use_swa", "--window_size=(56,40,24,8)"],
}
HEADS = {f"{n} heads": [] if n == 8 else ["--use_gqa", f"--n_kv_head={n}"] for n in (8, 4, 2, 1)}
RECALLING = {
    "gpt2": [],
    "rope": ROPE,
    "gqa": GQA,
    "swa": SWA,
    "modern": ROPE + GQA + SWA,
    "rope, window 16": [*ROPE, "--use_swa", "--window_size=16"],
    "rope, window 4 and full": [*ROPE, "--use_swa", "--window_size=(4,0,4,0)"],
    "rope, 1 of 8 heads": [*ROPE, "--use_gqa", "--n_kv_head=1"],
}
LONG = ("--block_size=1024", "--batch_size=2", "--micro_batch_size=2")
PARTS = {
    "rates": Part("shakespeare", rates()),
    "factorial": Part("stdlib", factorial(), flags=LONG),
    "windows": Part("shakespeare", WINDOWS),
    "stretch": Part("shakespeare", {"rope": ROPE}, look=at_other_lengths),
    "recall": Part("recall", RECALLING, flags=("--max_iters=900",), look=recalled),
    "heads": Part("shakespeare", HEADS, seeds=8, look=uptrained),
    "text": Part("shakespeare", VARIANTS, flags=("--max_iters=900",), look=written),
}


def rows_of_job(job, flags, dtype, folder):
    """Train, and look -> rows, see COLUMNS. In a process of its own with one thread"""
    torch.set_num_threads(1)
    part = PARTS[job.part]
    flags = [*flags, f"--dtype={dtype}", f"--dataset={job.data}", f"--seed={job.seed}"]
    out = Path(folder, "-".join(map(str, job)).replace(" ", "_").replace(",", ""))
    length = train.load_config([*SMALL, *flags])[1].block_size
    rows = []
    for step, (loss, seconds) in train_quietly(out, flags).items():
        rows.append(("loss", step, length, loss))
        rows.append(("seconds", step, length, seconds))
    rows.append((dtype, 0, length, 1))   # of this run
    if part.look:
        rows += part.look(job, out, flags)
    return [(*job, *row[:-1], f"{row[-1]:.4f}") for row in rows]


def jobs_of(names):
    """{Job: flags} of the parts with these names"""
    jobs = {}
    for name in names:
        part = PARTS[name]
        for seed in range(1, part.seeds + 1):
            for variant, flags in part.variants.items():
                jobs[Job(name, part.data, variant, seed)] = [*flags, *part.flags]
    return jobs


def job_of(row):
    return Job(row["part"], row["data"], row["variant"], int(row["seed"]))


def finished():
    """{Job: its rows}, as results/claims.csv has them"""
    results = {}
    if (RESULTS / "claims.csv").exists():
        for row in read_results("claims.csv"):
            results.setdefault(job_of(row), []).append(tuple(row.values()))
    return results


def write_rows(results):
    """{Job: rows} -> claims.csv, in the order of PARTS; jobs no longer in PARTS come last"""
    known = jobs_of(PARTS)
    order = [*known, *(job for job in results if job not in known)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for job in order:
        writer.writerows(results.get(job, []))
    with replacing(RESULTS / "claims.csv") as f:
        f.write(text.getvalue().encode())


def run_all(jobs, results, dtype, folder):
    """Run {Job: flags}, one per thread at a time; their rows go into results and claims.csv."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        try:
            futures = {}
            for job, flags in jobs.items():
                future = pool.submit(in_new_process, rows_of_job, job, flags, dtype, folder)
                futures[future] = job
            for i, future in enumerate(as_completed(futures), 1):
                job = futures[future]
                name = f"{i} of {len(jobs)}: {' '.join(map(str, job))}"
                try:
                    results[job] = future.result()
                except InputError as e:   # a loss that is not finite, for example
                    print(f"{name}: {e}")
                    continue
                write_rows(results)
                losses = [float(row[-1]) for row in results[job] if row[4] == "loss"]
                print(f"{name}: {losses[-1]:.4f}")
        finally:
            pool.shutdown(cancel_futures=True)   # Ctrl-C reaches the jobs under way, too


def prepare_texts(names, folder):
    """The text of recall is made anew each time, in folder."""
    for name in names:
        if name == "recall":
            text = Path(folder, "recall.txt")
            text.write_text(recall_text(), encoding="utf-8", newline="\n")
            prepare_text(Path("data/recall"), [text], "char")
        elif not Path("data", name, "meta.json").exists():
            prepare(name)


def main(argv):
    """Run the parts, all by default, as far as their rows are not there."""
    for name in argv:
        if name not in PARTS:
            raise InputError(f"claims {name}: unknown part; choose from {', '.join(PARTS)}, "
                             "or name no part to run all")
    print_versions()
    cpu_only()
    _, bf16, line = machine()
    print(line)
    results = finished()
    dtype = "bfloat16" if bf16 else "float32"
    for rows in results.values():   # as in the runs that are there
        dtype = next(row[4] for row in rows if row[4] in ("bfloat16", "float32"))
    jobs = {job: flags for job, flags in jobs_of(argv or PARTS).items() if job not in results}
    print(f"{len(jobs)} runs to do; to make finished ones again, remove their rows from "
          f"{RESULTS / 'claims.csv'}")
    with tempfile.TemporaryDirectory() as folder:
        prepare_texts(sorted({job.data for job in jobs}), folder)
        run_all(jobs, results, dtype, folder)
