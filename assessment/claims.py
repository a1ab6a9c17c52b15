"""
What the papers claim, in miniature: small models, trained by train.py from several seeds. What is
measured goes into results/claims.csv, a row each, with the flags of train.py and a hash of the
text; a run that is there with the same ones is not made again.
"""

import itertools
import tempfile
from collections.abc import Callable
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
    write_results,
)
from assessment.small_models import (
    LONG_STEPS,
    SMALL,
    losses_after_conversion,
    losses_at_other_lengths,
    quality_of_texts,
    recall_text,
    share_recalled,
    train_quietly,
)
from plumbing.errors import InputError, explain
from plumbing.run_folder import locked
from plumbing.token_files import load_meta
from prepare_data import prepare, prepare_text

# length: tokens read at once; of recall, how far back; 0 if neither
COLUMNS = ("part", "data", "variant", "seed", "measure", "step", "length", "value")

ROPE_FLAGS = ["--use_rope"]
GQA_FLAGS = ["--use_gqa", "--n_kv_head=2"]
SWA_FLAGS = ["--use_swa", "--window_size=32"]
RATES = ("5e-3", "1e-2", "1.5e-2", "2e-2", "3e-2", "5e-2")   # with Muon
ADAMW_RATES = ("2e-3", "4e-3", "8e-3")
VARIANTS = {
    "gpt2": [],
    "rope": ROPE_FLAGS,
    "gqa": GQA_FLAGS,
    "swa": SWA_FLAGS,
    "modern": ROPE_FLAGS + GQA_FLAGS + SWA_FLAGS,
}


class Job(NamedTuple):
    """One training, and all that is looked up with its result"""
    part: str
    data: str
    variant: str
    seed: int


class Part(NamedTuple):
    """One question: its variants, each trained from several seeds"""
    data: str
    variants: dict           # {variant: flags}
    seeds: int = 3
    flags: tuple = ()        # of all variants
    look: Callable | None = None   # look(job, out, flags) -> rows beside the losses,
                                   # (measure, step, length, value); out: the folder of the run


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


WINDOWS = {   # full attention and a window of 32 are in rates
    "8": ["--use_swa", "--window_size=8"],
    "growing": ["--use_swa", "--window_size=(8,24,40,56)"],
    "shrinking": ["--use_swa", "--window_size=(56,40,24,8)"],
}
HEADS = {f"{n} heads": [] if n == 8 else ["--use_gqa", f"--n_kv_head={n}"] for n in (8, 4, 2, 1)}
RECALLING = VARIANTS | {
    "rope, window 16": [*ROPE_FLAGS, "--use_swa", "--window_size=16"],
    "rope, windows 4 full 4 full": [*ROPE_FLAGS, "--use_swa", "--window_size=(4,0,4,0)"],
    "rope, 1 of 8 heads": [*ROPE_FLAGS, "--use_gqa", "--n_kv_head=1"],
}
TEXTS_OF_1024 = ("--block_size=1024", "--batch_size=2", "--micro_batch_size=2")
LONG = (f"--max_iters={LONG_STEPS}",)
PARTS = {
    "rates": Part("shakespeare", rates()),
    "factorial": Part("stdlib", factorial(), flags=TEXTS_OF_1024),
    "windows": Part("shakespeare", WINDOWS),
    "stretch": Part("shakespeare", {"rope": ROPE_FLAGS}, look=losses_at_other_lengths),
    "recall": Part("recall", RECALLING, flags=LONG, look=share_recalled),
    "heads": Part("shakespeare", HEADS, seeds=8, look=losses_after_conversion),
    "text": Part("shakespeare", VARIANTS, flags=LONG, look=quality_of_texts),
}


# ----------------------------------------------------------------------------------------------
# Running them


def rows_of_job(job, flags):
    """Train, and look -> rows, see COLUMNS. In a process of its own with one thread"""
    torch.set_num_threads(1)
    look = PARTS[job.part].look
    length = train.load_config([*SMALL, *flags])[1].block_size
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        for step, loss in train_quietly(out, flags).items():
            rows.append(("loss", step, length, loss))
        if look:
            rows += look(job, out, flags)
    rows = [(*job, *row[:-1], f"{row[-1]:.4f}") for row in rows]
    return [
        (*job, "flags", 0, length, recorded(flags)),
        (*job, "text", 0, length, hash_of_text(job.data)),
        *rows,
    ]


def recorded(flags):
    return " ".join(["config/shakespeare.py", *SMALL, *flags])


def hash_of_text(data):
    """The beginning of the SHA-256 of a prepared dataset's text"""
    return load_meta(Path("data", data))["source_sha256"][:8]


def jobs_of(names, dtype):
    """{Job: flags} of the parts with these names"""
    jobs = {}
    for name in names:
        part = PARTS[name]
        for seed in range(1, part.seeds + 1):
            for variant, flags in part.variants.items():
                jobs[Job(name, part.data, variant, seed)] = [
                    *flags, *part.flags, f"--dtype={dtype}", f"--dataset={part.data}",
                    f"--seed={seed}"]
    return jobs


def job_of(row):
    return Job(row["part"], row["data"], row["variant"], int(row["seed"]))


def value_of(rows, measure):
    """The value that a job's rows have of its flags or its text"""
    for row in rows:
        if row[COLUMNS.index("measure")] == measure:
            return row[-1]
    return ""


def missing_or_changed(results):
    """
    The jobs of PARTS that results have not, or with other flags than now. (The texts need not be
    on this machine.)
    """
    jobs = jobs_of(PARTS, dtype_of(results))
    return [job for job, flags in jobs.items()
            if value_of(results.get(job, []), "flags") != recorded(flags)]


def finished():
    """{Job: its rows}, as results/claims.csv has them"""
    results = {}
    for row in read_results("claims.csv"):
        results.setdefault(job_of(row), []).append(tuple(row.values()))
    return results


def write_rows(results):
    """{Job: rows} -> claims.csv, in the order of PARTS; jobs no longer in PARTS come last"""
    known = jobs_of(PARTS, dtype="any")   # the order is wanted, not the flags
    order = [*known, *(job for job in results if job not in known)]
    rows = [row for job in order for row in results.get(job, [])]
    write_results("claims.csv", COLUMNS, rows)


def run_all(jobs, results):
    """
    Run {Job: flags}, as many at once as torch has threads, with one thread each. Their rows go into
    results and claims.csv as they come. A job that fails stops no other.
    """
    failed = 0
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        futures = {}
        for job, flags in jobs.items():
            futures[pool.submit(in_new_process, rows_of_job, job, flags)] = job
        try:
            for i, future in enumerate(as_completed(futures), 1):
                job = futures[future]
                name = f"{i} of {len(jobs)}: {' '.join(map(str, job))}"
                try:
                    results[job] = future.result()
                except Exception as e:   # whatever it is, the other runs go on
                    print(f"{name}: {explain(e)}")
                    failed += 1
                    continue
                write_rows(results)
                losses = [row for row in results[job] if row[COLUMNS.index("measure")] == "loss"]
                print(f"{name}: loss {losses[-1][-1]}")
        finally:
            # After Ctrl-C, which the jobs under way have received as well: start no more.
            pool.shutdown(cancel_futures=True)
    if failed:
        raise InputError(f"{failed} of {len(jobs)} runs failed: the lines above say why; what "
                         "results/claims.csv had of them is as it was")


def prepare_texts(names):
    """
    The token files of these datasets, where they are missing. The recall text always comes anew
    from this code.
    """
    for name in names:
        if name == "recall":
            with tempfile.TemporaryDirectory() as folder:
                text = Path(folder, "recall.txt")
                text.write_text(recall_text(), encoding="utf-8", newline="\n")
                prepare_text(Path("data/recall"), [text], "char")
        elif not Path("data", name, "meta.json").exists():
            prepare(name)


def dtype_of(results, otherwise="bfloat16"):
    """That of the runs that are there, if any: others would not compare with them"""
    used = set()
    for rows in results.values():
        flags = value_of(rows, "flags").split()
        used |= {flag for flag in flags if flag.startswith("--dtype=")}
    if len(used) > 1:
        raise InputError("claims.csv has runs in bfloat16 and in float32, which do not compare: "
                         "remove those of one kind, or make all of those parts --again")
    return used.pop().removeprefix("--dtype=") if used else otherwise


def main(argv):
    """Run the parts, all by default, as far as they are not finished; with --again, all of them."""
    names = [word for word in argv if word != "--again"]
    for name in names:
        if name not in PARTS:
            raise InputError(f"claims {name}: unknown part; choose from {', '.join(PARTS)}, "
                             "or name no part to run all; --again runs what is finished, too")
    names = names or list(PARTS)
    print_versions()
    cpu_only()
    _, bf16, line = machine()
    print(line)
    with locked(RESULTS, "another `assessment claims` is writing to {}: wait for its end"):
        results = finished()
        again = names if "--again" in argv else []
        others = {job: rows for job, rows in results.items() if job.part not in again}
        dtype = dtype_of(others, "bfloat16" if bf16 else "float32")
        prepare_texts(sorted({PARTS[name].data for name in names}))
        jobs = {}
        for job, flags in jobs_of(names, dtype).items():
            rows = others.get(job, [])
            now = recorded(flags), hash_of_text(job.data)
            if (value_of(rows, "flags"), value_of(rows, "text")) != now:
                jobs[job] = flags
        print(f"{len(jobs)} runs to do, in {dtype}; --again makes finished ones again")
        run_all(jobs, results)
