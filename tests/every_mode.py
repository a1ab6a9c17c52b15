"""Train in every mode, uninterrupted and resumed from every other, starting processes only once."""

import json

import pytest
from helpers import LONGER, PROGRAMS, finish, prepare_tiny, torchrun

import train

# one process, DDP and FSDP, the digit being the number of accumulation steps
MODES = ("one3", "ddp3", "fsdp3")
MUON = "--optimizer=muon"
BF16 = "--dtype=bfloat16"


def train_every_mode(folder, n):
    """
    Runs of one process and of n, each in a folder of its own below folder: one1, one3, ddp1, ddp3,
    fsdp1, fsdp3; MODE-half and MODE-from-OTHER; with Muon MODE-muon and MODE-muon-resumed; ...
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        prepare_tiny()
        for argv in runs_of_one_process(n):
            train.main(argv)
        process = torchrun(PROGRAMS / "many_runs.py", json.dumps(runs_of_several(n)), n=n)
        finish(process)
        assert process.returncode == 0, process.err
        for start in MODES:
            train.main(resumed("one3", n, f"one3-from-{start}"))


def runs_of_one_process(n):
    return [
        whole("one1", n, "one1"),
        whole("one3", n, "one3"),
        half("one3", n, "one3-half"),
        whole("one3", n, "one3-muon", MUON),
    ]


def runs_of_several(n):
    runs = [whole(mode, n, mode) for mode in ("ddp1", "ddp3", "fsdp1", "fsdp3")]
    runs += [half(mode, n, f"{mode}-half") for mode in ("ddp3", "fsdp3")]
    for start in MODES:
        runs += [["copy", f"{start}-half", f"{mode}-from-{start}"] for mode in MODES]
        runs += [resumed(mode, n, f"{mode}-from-{start}") for mode in ("ddp3", "fsdp3")]
    less_memory = ["--checkpoint_activations", "--reshard_after_forward=False"]
    runs += [whole("fsdp3", n, "fsdp-recomputed", *less_memory)]
    runs += whole_and_interrupted("fsdp3", n, "fsdp3-bf16", BF16)
    runs += whole_and_interrupted("ddp3", n, "ddp3-muon", MUON)
    runs += whole_and_interrupted("fsdp3", n, "fsdp3-muon", MUON)
    return runs


def whole(mode, n, out_dir, *more):
    """The command line of an uninterrupted run"""
    parts = int(mode[-1])
    processes = 1 if mode.startswith("one") else n
    flags = [f"--micro_batch_size={12 // (processes * parts)}", f"--out_dir={out_dir}"]
    if mode.startswith("fsdp"):
        flags.append("--fsdp")
    return [*LONGER, *flags, *more]


def half(mode, n, out_dir, *more):
    return [*whole(mode, n, out_dir, *more), "--max_iters=10"]


def resumed(mode, n, out_dir, *more):
    return [*whole(mode, n, out_dir, *more), "--init_from=resume"]


def whole_and_interrupted(mode, n, name, flag):
    return [
        whole(mode, n, name, flag),
        half(mode, n, f"{name}-resumed", flag),
        resumed(mode, n, f"{name}-resumed", flag),
    ]
