"""
Small models: how the experiments of claims.py train one, and what they look up in it afterwards.
"""

import csv
import io
import math
import random
import statistics
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path

import torch

import train
from assessment.measure import RESULTS, ROOT
from assessment.stretch import METHODS, stretched
from assessment.writing import NEW, text_quality, texts_of, words_of
from model import GPT
from plumbing.checkpoints import load_checkpoint
from plumbing.errors import InputError
from plumbing.token_files import Data, load_meta
from plumbing.tokenizer import Tokenizer

TRAINED = 128   # tokens in a training sequence, unless a part says otherwise
STEPS = 300     # of training, unless a part says otherwise
LONG_STEPS = 900
EVERY = 100     # steps between evaluations
RATE = "1.5e-2"

# 2,048 tokens per step; 480 sequences of 128 tokens per evaluation
SMALL = [
    "--device=cpu", "--n_layer=4", "--n_head=8", "--n_embd=128", f"--block_size={TRAINED}",
    "--dropout=0", "--batch_size=16", "--micro_batch_size=16", f"--max_iters={STEPS}",
    "--optimizer=muon", f"--learning_rate={RATE}", "--warmup_iters=40",
    f"--eval_interval={EVERY}", "--eval_iters=30", "--log_interval=50",
]
CONFIG = ROOT / "config" / "shakespeare.py"


def train_quietly(out, flags):
    """train.py into the folder out -> {step: validation loss}"""
    flags = [str(CONFIG), *SMALL, *flags, f"--out_dir={out}"]
    with redirect_stdout(io.StringIO()):
        train.main(flags)
    with open(out / "metrics.csv", encoding="utf-8", newline="") as f:
        losses = {int(row["step"]): float(row["val_loss"]) for row in csv.DictReader(f)
                  if row["val_loss"]}
    if train.load_config(flags)[0].max_iters not in losses:
        raise InputError("the run was stopped before its last step")
    return losses


# ----------------------------------------------------------------------------------------------
# What is looked up after a training, in the folder out -> rows of (measure, step, length, value)

LENGTHS = (128, 256, 512, 1024)   # tokens read at once by models trained on 128
FURTHER = 512         # tokens in a sequence of the training that follows
FURTHER_STEPS = 30


@torch.no_grad()
def loss_at_length(out, data_name, T):
    """
    Validation loss on the last 64 of every 1,024 characters, read together with the T - 64 before
    them: the same 64 for every T
    """
    model = GPT.from_pretrained(out / "ckpt.pt", block_size=max(T, TRAINED))
    folder = Path("data") / data_name
    data = Data(folder, load_meta(folder), "val", max(LENGTHS), seed=0)
    losses = []
    for i in range(100):
        x, y = data.sequences([i])
        y[:, :-64] = -1
        losses.append(model(x[:, -T:], y[:, -T:])[1].item())
    return statistics.mean(losses)


def losses_at_other_lengths(job, out, flags):
    """Texts longer than those of training, at once and after a few steps on such texts"""
    rows = []
    for method in METHODS:
        for T in LENGTHS:
            with stretched(method, T / TRAINED, TRAINED):
                loss = loss_at_length(out, job.data, T)
            rows.append((method, STEPS, T, loss))
        further = Path(f"{out}-{method}")
        s = FURTHER / TRAINED
        with stretched(method, s, TRAINED):
            train_quietly(further, [
                *flags, f"--init_from={out / 'ckpt.pt'}", f"--block_size={FURTHER}",
                "--batch_size=4", "--micro_batch_size=4", f"--max_iters={FURTHER_STEPS}",
                f"--eval_interval={FURTHER_STEPS}", "--eval_iters=1", "--warmup_iters=0",
                "--learning_rate=5e-3"])
        for T in LENGTHS:
            with stretched(method, max(s, T / TRAINED), TRAINED):
                loss = loss_at_length(further, job.data, T)
            rows.append((method, STEPS + FURTHER_STEPS, T, loss))
    return rows


REPEATED = (12, 24, 48)   # letters in a line of the recall text


def line_of_letters(n, rng):
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=n)) + "\n"


def recall_text():
    """Lines of 12, 24 or 48 random letters, each twice: the second can be known from the first."""
    rng = random.Random(0)
    lines = [line_of_letters(rng.choice(REPEATED), rng) for _ in range(42_000)]
    return "".join(2 * line for line in lines)


def recall_bounds():
    """
    The loss on lines like those of the recall text of a model that knows its shape but no line from
    the one before, and of one that knows every letter whose first copy stands in its context. Both
    are told where lines begin and end; positions in the context are equally likely.
    """
    lines = recall_text().split("\n")[:20_000]
    letters = sum(len(line) for line in lines)
    tokens = letters + len(lines)
    unknown = 0.0
    for first, second in zip(lines[::2], lines[1::2], strict=True):
        # The letter after token p of the context was said at p - len(first).
        unknown += len(first) + len(second) * len(first) / TRAINED
    return math.log(26) * letters / tokens, math.log(26) * unknown / tokens


def line_in_context(n, rng):
    """
    A line of n letters said twice, somewhere in 129 characters of such lines -> the text, and where
    the second copy begins
    """
    lines = [2 * line_of_letters(rng.choice(REPEATED), rng) for _ in range(12)]
    before, after = "".join(lines[:6]), "".join(lines[6:])   # each at least 129 long
    pair = 2 * line_of_letters(n, rng)
    begin = rng.randrange(TRAINED + 2 - len(pair))
    text = before[len(before) - begin:] + pair + after
    return text[:TRAINED + 1], begin + n + 1


@torch.no_grad()
def share_recalled(job, out, flags):
    """
    Of the letters of a repeated line, from its second on, the share for which the model's likeliest
    next letter is right. The length of a row is how far back the first copy stands.
    """
    model = GPT.from_pretrained(out / "ckpt.pt")
    tokenizer = Tokenizer(model.tokenizer_spec)
    rng = random.Random(1)
    target = torch.arange(1, TRAINED + 1)   # the place in the text that each guess is for
    rows = []
    for n in REPEATED:
        texts, starts = zip(*(line_in_context(n, rng) for _ in range(200)), strict=True)
        idx = torch.tensor([tokenizer.encode(text) for text in texts])
        start = torch.tensor(starts)[:, None]
        right = model(idx[:, :-1], idx[:, 1:])[0].argmax(-1) == idx[:, 1:]
        counts = (target > start) & (target < start + n)   # letters 2 to n
        rows.append(("recall", LONG_STEPS, n + 1, right[counts].float().mean().item()))
    return rows


def convert(source, target, how, n_kv_head):
    """
    Write the last checkpoint in source to target, with n_kv_head key/value heads: each is the mean
    or the first of those it replaces. There are no biases.
    """
    path = source / "ckpt.pt"
    checkpoint = load_checkpoint(path)
    grouped = GPT.from_pretrained(path, use_gqa=True, n_kv_head=n_kv_head)   # the mean
    if how == "first":
        multi_head = GPT.from_pretrained(path)
        H = multi_head.config.n_head
        C = multi_head.config.n_embd
        K = n_kv_head
        D = C // H
        for block, old_block in zip(grouped.h, multi_head.h, strict=True):
            old = old_block.attn.c_attn.weight.data[C:].view(2, K, H // K, D, C)
            block.attn.c_attn.weight.data[C:].view(2, K, D, C).copy_(old[:, :, 0])
    target.mkdir()
    changed = {"model": grouped.state_dict(), "gpt_config": asdict(grouped.config)}
    torch.save(checkpoint | changed, target / "best.pt")


CONVERTED = [(n, how) for n in (2, 1) for how in ("mean", "first")]
AFTER_CONVERSION = (0, 15, 30, 75, 150)   # steps: 0, 5, 10, 25 and 50% of those before
UPTRAINING = ["--max_iters=150", "--eval_interval=15", "--warmup_iters=0", "--learning_rate=5e-3",
              "--min_lr=5e-3"]


def losses_after_conversion(job, out, flags):
    """A multi-head model converted to fewer heads, and trained for up to half as many steps more"""
    if job.variant != "8 heads":
        return []
    rows = []

    def train_from(path, measure, *heads):
        target = out.with_name(measure.replace(" ", "_"))
        losses = train_quietly(target, [*flags, f"--init_from={path}", *heads, *UPTRAINING])
        for step in AFTER_CONVERSION:
            rows.append((measure, step, TRAINED, losses[step]))

    for n, how in CONVERTED:
        source = Path(f"{out}-{how}-{n}")
        convert(out, source, how, n)
        train_from(source / "best.pt", f"{how} of {8 // n}", "--use_gqa", f"--n_kv_head={n}")
    train_from(out / "ckpt.pt", "not converted")
    return rows


def quality_of_texts(job, out, flags):
    """The quality of generated text; three texts to read go into results/text-*.txt"""
    text = Path("data", job.data, "input.txt").read_text(encoding="utf-8")
    cut = int(0.9 * len(text))
    known = set(words_of(text[:cut]))
    texts = texts_of(out, text[cut:], job.seed)
    rows = [(name, LONG_STEPS, 0, value) for name, value in text_quality(texts, known).items()]
    if job.variant == "gpt2":
        held_out = text[cut:]
        places = range(0, len(held_out) - NEW, len(held_out) // len(texts))
        human = text_quality([held_out[place:place + NEW] for place in places], known)
        rows += [(f"{name}, Shakespeare", 0, 0, value) for name, value in human.items()]
    RESULTS.mkdir(exist_ok=True)
    Path(RESULTS, f"text-{job.variant}-{job.seed}.txt").write_text(
        "\n----\n".join(texts[:3]) + "\n", encoding="utf-8", newline="\n")
    return rows
