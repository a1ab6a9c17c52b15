"""
The experiments of the assessment: small models, trained by train.py from several seeds. What is
measured goes into results/claims.csv, a row each; a run whose rows are there is not made again.
"""

import csv
import io
import itertools
import random
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

import train
from assessment.claims import SMALL, convert, loss_at_length, prepare_texts, train_quietly
from assessment.measure import (
    RESULTS,
    cpu_only,
    in_new_process,
    machine,
    print_versions,
    read_results,
)
from assessment.stretch import METHODS, stretched
from assessment.writing import figures, texts_of, words_of
from model import GPT
from plumbing.errors import InputError
from plumbing.files import replacing
from plumbing.tokenizer import Tokenizer

COLUMNS = ("part", "data", "variant", "seed", "measure", "step", "length", "value")
TRAINED = 128   # tokens in a training sequence, unless a part says otherwise
LENGTHS = (128, 256, 512, 1024)

ROPE = ["--use_rope"]
GQA = ["--use_gqa", "--n_kv_head=2"]
SWA = ["--use_swa", "--window_size=32"]
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
# What is looked up after a training, in the folder out -> rows of (measure, step, length, value)

def at_other_lengths(job, out, flags):
    """Texts longer than those of training, at once and after 30 steps on 512 tokens"""
    rows = []
    for method in METHODS:
        for T in LENGTHS:
            with stretched(method, T / TRAINED, TRAINED):
                loss = loss_at_length(out, job.data, T)
            rows.append((method, 300, T, loss))
        further = Path(f"{out}-{method}")
        s = 512 / TRAINED
        with stretched(method, s, TRAINED):
            train_quietly(further, [
                *flags, f"--init_from={out / 'ckpt.pt'}", "--block_size=512", "--batch_size=4",
                "--micro_batch_size=4", "--max_iters=30", "--eval_interval=30", "--eval_iters=1",
                "--warmup_iters=0", "--learning_rate=5e-3"])
        for T in LENGTHS:
            with stretched(method, max(s, T / TRAINED), TRAINED):
                loss = loss_at_length(further, job.data, T)
            rows.append((method, 330, T, loss))
    return rows


REPEATED = (12, 24, 48)   # letters in a line of the recall text


def line_of_letters(n, rng):
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=n)) + "\n"


def recall_text():
    """Lines of 12, 24 or 48 random letters, each twice: the second can be known from the first."""
    rng = random.Random(0)
    lines = [line_of_letters(rng.choice(REPEATED), rng) for _ in range(42_000)]
    return "".join(2 * line for line in lines)


@torch.no_grad()
def recalled(job, out, flags):
    """
    Of the letters of a repeated line, from its second on, the share for which the model's likeliest
    next letter is right. The length of a row is how far back the first copy stands.
    """
    model = GPT.from_pretrained(out / "ckpt.pt")
    tokenizer = Tokenizer(model.tokenizer_spec)
    rng = random.Random(1)
    rows = []
    for n in REPEATED:
        texts = [2 * line_of_letters(n, rng) for _ in range(200)]
        idx = torch.tensor([tokenizer.encode(text) for text in texts])
        guesses = model(idx[:, :-1])[0].argmax(-1)
        right = (guesses == idx[:, 1:])[:, n + 1:2 * n]   # these columns predict letters 2 to n
        rows.append(("recall", 900, n + 1, right.float().mean().item()))
    return rows


CONVERTED = [(n, how) for n in (2, 1) for how in ("mean", "first")]
UPTRAINING = ["--max_iters=150", "--eval_interval=15", "--warmup_iters=0", "--learning_rate=5e-3",
              "--min_lr=5e-3"]


def uptrained(job, out, flags):
    """A multi-head model converted to fewer heads, and trained for up to half as many steps more"""
    if job.variant != "8 heads":
        return []
    rows = []

    def train_from(path, measure, *heads):
        target = Path(f"{out}-{measure}".replace(" ", "_"))
        points = train_quietly(target, [*flags, f"--init_from={path}", *heads, *UPTRAINING])
        for step in (0, 15, 30, 75, 150):
            rows.append((measure, step, TRAINED, points[step][0]))

    for n, how in CONVERTED:
        source = Path(f"{out}-{how}-{n}")
        convert(out, source, how, n)
        train_from(source / "best.pt", f"{how} of {8 // n}", "--use_gqa", f"--n_kv_head={n}")
    train_from(out / "ckpt.pt", "not converted")
    return rows


def written(job, out, flags):
    """The quality of generated text; three texts to read go into results/text-*.txt"""
    text = Path("data", job.data, "input.txt").read_text(encoding="utf-8")
    cut = int(0.9 * len(text))
    known = set(words_of(text[:cut]))
    texts = texts_of(out, text[cut:], job.seed)
    rows = [(name, 900, 0, value) for name, value in figures(texts, known).items()]
    if job.variant == "gpt2":
        held_out = text[cut:]
        places = range(0, len(held_out) - 240, len(held_out) // len(texts))
        human = figures([held_out[place:place + 240] for place in places], known)
        rows += [(f"{name}, Shakespeare", 0, 0, value) for name, value in human.items()]
    RESULTS.mkdir(exist_ok=True)
    Path(RESULTS, f"text-{job.variant}-{job.seed}.txt").write_text(
        "\n----\n".join(texts[:3]) + "\n", encoding="utf-8", newline="\n")
    return rows


# ----------------------------------------------------------------------------------------------
# The parts

def rates():
    """Each variant at several learning rates, and two of them with AdamW"""
    found = {}
    for name, switches in VARIANTS.items():
        for rate in ("5e-3", "1e-2", "1.5e-2", "2e-2"):
            found[f"{name} muon {rate}"] = [*switches, f"--learning_rate={rate}"]
    for name, rate in itertools.product(("gpt2", "rope"), ("2e-3", "4e-3")):
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


HEADS = {f"{n} heads": [] if n == 8 else ["--use_gqa", f"--n_kv_head={n}"] for n in (8, 4, 2, 1)}
RECALLING = {
    "learned positions": [],
    "rope": ROPE,
    "rope, window 16": [*ROPE, "--use_swa", "--window_size=16"],
    "rope, window 4 and full": [*ROPE, "--use_swa", "--window_size=(4,0,4,0)"],
    "rope, 1 of 8 heads": [*ROPE, "--use_gqa", "--n_kv_head=1"],
}
LONG = ("--block_size=1024", "--batch_size=2", "--micro_batch_size=2")
PARTS = {
    "rates": Part("shakespeare", rates()),
    "factorial": Part("stdlib", factorial(), flags=LONG),
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
        for variant, flags in part.variants.items():
            for seed in range(1, part.seeds + 1):
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
                futures[job] = pool.submit(in_new_process, rows_of_job, job, flags, dtype, folder)
            for i, (job, future) in enumerate(futures.items(), 1):
                results[job] = future.result()
                write_rows(results)
                losses = [float(row[-1]) for row in results[job] if row[4] == "loss"]
                print(f"{i} of {len(jobs)}: {' '.join(map(str, job))}: {losses[-1]:.4f}")
        finally:
            pool.shutdown(cancel_futures=True)   # Ctrl-C reaches the jobs under way, too


# ----------------------------------------------------------------------------------------------
# Paired differences

T_95 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}   # two-sided, by df


def values_of(rows, part, variant, measure="loss", step=None, length=None):
    """{seed: value}; without a step, of the last one"""
    found = {}
    lengths = set()
    for row in rows:
        if (row["part"], row["variant"], row["measure"]) != (part, variant, measure):
            continue
        if length in (None, int(row["length"])) and step in (None, int(row["step"])):
            lengths.add(row["length"])
            found.setdefault(int(row["step"]), {})[int(row["seed"])] = float(row["value"])
    if len(lengths) != 1:
        raise InputError(f"claims.csv: {part}, {variant}, {measure} at {len(lengths)} lengths")
    return found[max(found)]


def difference(new, old):
    """{seed: value} twice -> mean of new - old over the seeds, and half of its 95% interval"""
    differences = [new[seed] - old[seed] for seed in sorted(new.keys() & old.keys())]
    n = len(differences)
    half = T_95[n - 1] * statistics.stdev(differences) / n ** 0.5
    return statistics.mean(differences), half


def main(argv):
    """Run the parts, all by default, as far as their rows are not there."""
    for name in argv:
        if name not in PARTS:
            raise InputError(f"experiments {name}: unknown part; choose from {', '.join(PARTS)}, "
                             "or name none to run all")
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
        prepare_texts(sorted({job.data for job in jobs}), folder, recall_text())
        run_all(jobs, results, dtype, folder)
