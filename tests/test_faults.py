"""Faults of one process: full disks, signals, numbers that overflow, kill -9."""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
from helpers import (
    TINY,
    checkpoint,
    fails,
    needs_full_disk,
    needs_linux,
    read_until,
    same_state,
    start,
    val_losses,
)

import train
from model import GPT
from plumbing import reporting
from plumbing.errors import report

pytestmark = pytest.mark.usefixtures("short_sample")


def test_out_dir_that_cannot_be_written_is_one_clear_line():
    Path("occupied").write_text("a file")
    fails(train, *TINY, "--out_dir=occupied/out", match="out_dir=occupied.out: Not a directory")
    assert Path("occupied").read_text() == "a file"


@needs_full_disk
@pytest.mark.parametrize("name, flag", [
    ("best", "--eval_interval=6"),   # ckpt.pt would be the same file
    ("ckpt", "--checkpoint_interval=1"),
])
def test_full_disk_leaves_the_previous_checkpoint_whole(name, flag):
    train.main([*TINY, "--max_iters=6"])
    before = Path("out/ckpt.pt").read_bytes()
    Path(f"out/{name}.pt.tmp").symlink_to("/dev/full")
    fails(train, *TINY, "--init_from=resume", flag, match=f"cannot save out.{name}.pt .*untouched")
    assert Path("out/ckpt.pt").read_bytes() == Path("out/best.pt").read_bytes() == before
    assert checkpoint()["step"] == 6


# ------------------------------------------------------------------------------------------------
# Numbers that are not finite

def infinite_loss(model):
    return float("inf")


def infinite_slope(model):
    """Zero, but its gradient is not finite: the square root has a vertical tangent there."""
    difference = model.ln_f.weight - model.ln_f.weight.detach()
    return difference.abs().sqrt().sum()


@pytest.mark.parametrize("flags", [[], ["--checkpoint_interval=1"]])
@pytest.mark.parametrize("added, what", [
    (infinite_loss, "loss inf"),
    (infinite_slope, "(loss|gradient norm) nan"),   # the next loss is nan, too
])
def test_run_stops_before_it_overwrites_anything(added, what, flags, monkeypatch):
    train.main([*TINY, "--max_iters=6"])
    before = {path: path.read_bytes() for path in Path("out").glob("*.pt")}
    forward = GPT.forward

    def faulty_forward(self, *args, **options):
        logits, loss = forward(self, *args, **options)
        if self.training:
            loss = loss + added(self)
        return logits, loss
    monkeypatch.setattr(GPT, "forward", faulty_forward)
    fails(train, *TINY, "--init_from=resume", *flags, match=f"step [79]: {what}")
    assert before == {path: path.read_bytes() for path in Path("out").glob("*.pt")}


# ------------------------------------------------------------------------------------------------
# Signals

@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_finishes_the_step_saves_and_exits_0(number):
    process = start(*TINY, "--max_iters=1000000", "--eval_interval=1000000",
                    "--checkpoint_interval=1000000")
    read_until(process, "| loss")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in err
    assert err.endswith("finishing this step; Ctrl-C once more stops at once\n")
    assert out.splitlines()[-1].endswith("--checkpoint_interval=1000000 --init_from=resume")
    assert checkpoint()["step"] > 0


def test_signal_before_the_first_step_leaves_nothing_to_resume(monkeypatch, capsys):
    install = signal.signal
    installed = []

    def install_and_raise(number, handler):
        before = install(number, handler)
        installed.append(number)
        if len(installed) == 2:   # both are installed, the last thing before the loop
            signal.raise_signal(signal.SIGINT)
        return before
    monkeypatch.setattr(signal, "signal", install_and_raise)
    train.main([*TINY, "--init_from=scratch"])
    assert set(installed[:2]) == {signal.SIGINT, signal.SIGTERM}
    assert not Path("out/ckpt.pt").exists()
    assert capsys.readouterr().out.splitlines()[-1].endswith("--init_from=scratch")


@needs_linux
def test_run_killed_twice_and_resumed_is_exact_to_the_bit():
    """kill -9 at a random moment of the training"""
    flags = [*TINY, "--max_iters=200", "--dropout=0.1", "--checkpoint_interval=1",
             "--eval_interval=50", "--log_interval=50"]
    train.main([*flags, "--out_dir=whole"])
    for _ in range(2):
        process = start(*flags, "--init_from=auto")
        read_until(process, "step ")
        time.sleep(0.4 * random.random())
        process.kill()
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
    train.main([*flags, "--init_from=auto"])
    assert same_state(Path("out"), Path("whole"))
    assert val_losses() == val_losses("whole/metrics.csv")


# ------------------------------------------------------------------------------------------------
# The command line

@pytest.mark.parametrize("script, argv", [
    ("train.py", ["--n_laye=3"]),
    ("sample.py", ["--out_dir=nowhere"]),
    ("prepare_data.py", ["nothing"]),
])
def test_command_line_prints_one_line_and_no_traceback(script, argv):
    process = start(*argv, script=script)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    lines = [line for line in err.splitlines() if not line.startswith("device:")]
    assert len(lines) == 1 and lines[0].startswith("error: "), err


def test_report_to_torchrun_appears_whole(monkeypatch):
    seen = []
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "error.json")
    # fsync is called once all is written: nothing may be shown yet
    monkeypatch.setattr(os, "fsync", lambda fd: seen.append(Path("error.json").exists()))
    report("what went wrong")
    assert seen == [False]
    message = json.loads(Path("error.json").read_text())["message"]["message"]
    assert message == "what went wrong"


@pytest.mark.parametrize("argv", [
    ["a.py", "--seed=1"],
    ["--init_from=auto", "a.py", "--seed=1"],
    ["a.py", "--init_from", "gpt2", "--seed=1", "--init_from=resume"],
])
def test_resume_command_asks_to_resume_once(argv):
    assert reporting.without_init_from(argv) == ["a.py", "--seed=1"]
