"""
Several processes, and something goes wrong: all of them end, one of them says why in one line, and
a run that continues afterwards is the run that it would have been.
"""

import functools
import os
import random
import shutil
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from every_mode import whole
from helpers import (
    HERE,
    PROGRAMS,
    TINY,
    checkpoint,
    fails_at_once,
    finish,
    needs_full_disk,
    needs_linux,
    read_until,
    same_state,
    start,
    torchrun,
    val_losses,
    without,
    workers,
)

import train
from plumbing import processes
from plumbing.errors import InputError, explain

# ------------------------------------------------------------------------------------------------
# One line

@pytest.mark.parametrize("argv, match", [
    (["--batch_size=5"], "error: batch_size=5 is not divisible among 2 process.* 2 sequences"),
    pytest.param(["--n_laye=5"], "error: --n_laye is not a setting, did you mean n_layer",
                 marks=pytest.mark.slow),
    (["--dataset=nothing"], "error: unknown dataset 'nothing'"),
])
def test_what_is_wrong_for_all_processes_is_said_once(argv, match):
    fails_at_once(torchrun(HERE / "train.py", *TINY, *argv), match)


@pytest.mark.parametrize("fault, flags, match", [
    ("nan", [], "error: step 4: loss nan"),   # DDP's warm-up is the first of the five calls
    pytest.param("nan", ["--fsdp"], "error: step 5: loss nan", marks=pytest.mark.slow),
    pytest.param("error", [], "error: only here", marks=pytest.mark.slow),
    ("memory", ["--fsdp"], "error: not enough memory"),
])
def test_what_goes_wrong_on_one_rank_ends_all_with_its_one_line(fault, flags, match):
    argv = [*TINY, *flags, "--max_iters=1000", "--checkpoint_interval=1"]
    fails_at_once(torchrun(PROGRAMS / "one_rank_fails.py", fault, *argv), match)


@pytest.mark.slow
@needs_full_disk
def test_full_disk_on_rank_0_ends_all_and_leaves_the_previous_checkpoint_whole():
    train.main([*TINY, "--max_iters=6"])
    before = Path("out/ckpt.pt").read_bytes()
    Path("out/best.pt.tmp").symlink_to("/dev/full")   # ckpt.pt is a second name of it
    process = torchrun(HERE / "train.py", *TINY, "--init_from=resume")
    fails_at_once(process, "error: cannot save out.best.pt .*untouched")
    assert Path("out/ckpt.pt").read_bytes() == before


@needs_linux
def test_line_is_said_though_torchrun_ends_the_process_meanwhile(capsys):
    received = []

    class Store:
        def add(self, key, number):
            os.kill(os.getpid(), signal.SIGTERM)
            return 1

        def set(self, key, value):
            self.why = value.encode()

        def get(self, key):
            return self.why
    before = signal.signal(signal.SIGTERM, lambda *args: received.append(args))
    try:
        processes.first_to_fail(processes.Group(Store(), 1, 2), InputError("too long"))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [] and capsys.readouterr().err == "error: too long\n"


def test_rank_0_that_never_comes_is_one_clear_line():
    store = dist.HashStore()
    store.set_timeout(timedelta(milliseconds=50))
    with pytest.raises(dist.DistStoreError) as failure:
        processes.agree(store, rank=1, world=2)
    assert explain(failure.value).startswith("error: another process is gone (Wait timeout")


@pytest.mark.parametrize("other_has_one", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_machines_that_see_different_checkpoints_are_told(other_has_one):
    shutil.copytree("data", "elsewhere/data")
    train.main([*TINY, "--max_iters=6"])
    if other_has_one:
        train.main([*TINY, "--max_iters=8", "--out_dir=elsewhere/out"])
    # dtype=auto: processes without a checkpoint talk to each other to decide it, so they must
    # compare their steps before that
    argv = [*without(TINY, "dtype"), "--dtype=auto", "--init_from=auto"]
    process = torchrun(PROGRAMS / "another_disk.py", *argv)
    fails_at_once(process, "error: out is .* step .*one folder")


# ------------------------------------------------------------------------------------------------
# Ends and restarts

@needs_linux
@pytest.mark.parametrize("flags", [[], pytest.param(["--fsdp"], marks=pytest.mark.slow)])
def test_SIGTERM_to_torchrun_saves_and_every_worker_exits_0(flags):
    """torchrun itself then always ends with status 1 and a traceback of its own."""
    argv = [*TINY, *flags, "--max_iters=1000000", "--eval_interval=1000000"]
    process = torchrun(PROGRAMS / "silent_end.py", *argv)
    read_until(process, "step 30/")
    process.send_signal(signal.SIGTERM)
    out, ours = finish(process)
    assert not ours
    assert checkpoint()["step"] >= 30
    assert "SIGTERM: stopped at step" in out
    assert "torchrun --standalone --nproc_per_node=2 train.py" in out.splitlines()[-1]
    assert Path("left-0").read_text() == Path("left-1").read_text() == "0"


def is_alive(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@needs_linux
@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--fsdp"]], ids=["ddp", "fsdp"])
def test_workers_save_and_end_when_torchrun_is_killed(flags):
    argv = [*TINY, *flags, "--max_iters=1000000", "--eval_interval=1000000", "--log_interval=1"]
    process = torchrun(HERE / "train.py", *argv)
    read_until(process, "step 30/")
    left = workers(process)
    process.kill()
    deadline = time.monotonic() + 15
    while any(is_alive(pid) for pid in left):
        assert time.monotonic() < deadline, "a worker trains on"
        time.sleep(0.1)
    process.communicate()
    assert checkpoint()["step"] >= 30


@needs_linux
@pytest.mark.parametrize("mode", ["ddp3", pytest.param("fsdp3", marks=pytest.mark.slow)])
def test_killed_worker_restarts_the_group_which_continues_from_the_last_checkpoint(modes, mode):
    folder, n = modes
    argv = [*whole(mode, n, "out"), "--checkpoint_interval=5", "--init_from=auto"]
    options = ("--standalone", "--max-restarts=1")
    process = torchrun(HERE / "train.py", *argv, n=n, options=options)
    read_until(process, "step 13/20")
    os.kill(workers(process)[1], signal.SIGKILL)
    out, ours = finish(process)
    assert process.returncode == 0, process.err
    assert len(ours) == 1 and "error: another process is gone" in ours[0], process.err
    assert "resuming out/ckpt.pt at step" in out
    assert same_state(Path("out"), folder / mode)


def kill_one(process, several, rng):
    """kill -9 at a random moment: of the process, or of one of its workers; also while it starts"""
    if rng.random() < 0.2:
        while several and process.poll() is None and len(workers(process)) < 2:
            time.sleep(0.02)
        time.sleep(3 * rng.random())
    else:
        for line in process.stdout:
            if "| loss" in line:   # after training steps, each of which has left a checkpoint
                break
        time.sleep(0.4 * rng.random())
    try:
        os.kill(rng.choice(workers(process)) if several else process.pid, signal.SIGKILL)
    except (IndexError, ProcessLookupError, FileNotFoundError):   # it has come to its end
        pass
    process.communicate(timeout=120)


@needs_linux
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["one", "ddp", "fsdp"])
def test_run_killed_67_times_and_resumed_is_exact_to_the_bit(mode):
    several = mode != "one"
    steps = 3000 if several else 5000   # more than 67 runs get to
    flags = [*TINY, f"--max_iters={steps}", "--dropout=0.1", "--checkpoint_interval=1",
             "--eval_interval=50", "--log_interval=10"]
    if mode == "fsdp":
        flags.append("--fsdp")
    begin = functools.partial(torchrun, HERE / "train.py") if several else start

    def to_the_end(*more):
        process = begin(*flags, *more)
        process.communicate(timeout=1800)
        assert process.returncode == 0
    to_the_end("--out_dir=whole")
    seed = time.time_ns()
    print(f"seed {seed}")   # shown if the test fails
    rng = random.Random(seed)
    died = 0
    while died < 67:
        process = begin(*flags, "--init_from=auto")
        kill_one(process, several, rng)
        died += process.returncode != 0
        if Path("out/ckpt.pt").exists():   # readable after every kill
            assert checkpoint()["step"] < steps, f"it came to its end after {died} kills"
    to_the_end("--init_from=auto")
    assert checkpoint()["step"] == steps
    assert same_state(Path("out"), Path("whole"))
    assert val_losses() == val_losses("whole/metrics.csv")
