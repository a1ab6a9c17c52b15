"""The folder of a run, out_dir: its checkpoints ckpt.pt (the last) and best.pt, and metrics.csv."""

import csv
import itertools
import math
import os
import time
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:   # Windows
    fcntl = None

from plumbing.errors import InputError
from plumbing.files import replacing


@contextmanager
def writing_to(out, step, rank):
    """
    The block in which a run at this step writes to its folder -> a Metrics for rank 0, else None.
    What a new run finds there moves to old1/, old2/, ...
    """
    if rank > 0:
        yield None
        return
    with locked(out):
        if step == 0:
            move_earlier_run(out)
        yield Metrics(out / "metrics.csv", resume_step=step or None)


@contextmanager
def locked(out, message="out_dir={}: another run writes there, name another one"):
    """
    Make the folder of a run, and keep other runs out of it until the block ends, or the process,
    however it ends. InputError with this message if another run is in it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as e:   # ValueError: characters that no name can have
        name = str(out) if str(out).isprintable() else repr(str(out))
        raise InputError(
            f"out_dir={name}: {getattr(e, 'strerror', e)}; name a folder that can be created and "
            "written to"
        ) from None
    if fcntl is None:   # Windows, which does not replace files that are open
        yield
        return
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(message.format(out)) from None
        except OSError:   # a disk without locks
            pass
        yield
    finally:
        os.close(folder)


def move_earlier_run(out):
    """Into old1, or old2, ..."""
    names = [name for name in ("ckpt.pt", "best.pt", "metrics.csv") if (out / name).exists()]
    if not names:
        return
    for n in itertools.count(1):
        old = out / f"old{n}"
        if not old.exists():
            break
    old.mkdir()
    for name in names:
        os.replace(out / name, old / name)
    print(f"{out} contained an earlier run: {', '.join(names)} are now in {old}")


def checkpoint_of_run(out_dir):
    """The checkpoint that represents a run: best.pt, else ckpt.pt, else None."""
    for name in ("best.pt", "ckpt.pt"):
        path = Path(out_dir) / name
        if path.exists():
            return path
    return None


def checkpoint_to_resume(out_dir, init_from):
    """The path of the last checkpoint if init_from asks to continue that run, otherwise None."""
    path = Path(out_dir) / "ckpt.pt"
    if init_from == "resume" and not path.exists():
        moved = ", ".join(str(p) for p in path.parent.glob("old*/ckpt.pt"))
        hint = f"; earlier runs were moved to {moved}" if moved else ""
        raise InputError(
            f"{path} does not exist: nothing to resume; --init_from=scratch starts a new run, "
            f"--init_from=auto resumes if possible{hint}"
        )
    if init_from in ("resume", "auto") and path.exists():
        return path
    return None


def is_whole(row):
    """Whether all cells of a row of metrics.csv are there, and numbers if not empty"""
    cells = list(row.values())
    try:
        int(row["step"])
        return None not in cells and all(math.isfinite(float(cell or 0)) for cell in cells)
    except (TypeError, ValueError):
        return False


class Metrics:
    """
    metrics.csv: one row per printed line, with empty fields for what that line does not have.
    Losses are in nats per token; tokens counts those trained on so far; elapsed_s is seconds since
    the run began, without the time between an interruption and its resumption.

    resume_step: continue the file at this step. Rows after it are dropped, to be written again.
    """

    FIELDS = (
        "step", "tokens", "train_loss", "val_loss", "lr", "grad_norm", "tokens_per_s", "elapsed_s"
    )

    def __init__(self, path, resume_step=None):
        self.path = path
        self.rows = []   # as they are in the file: {field: text}
        if resume_step is not None and path.exists():
            self.rows = self.rows_until(resume_step)
        elapsed_before = 0.0
        if self.rows:
            elapsed_before = float(self.rows[-1]["elapsed_s"] or 0)
        self.start = time.perf_counter() - elapsed_before
        lines = [self.FIELDS] + [row.values() for row in self.rows]
        with replacing(path) as f:
            for line in lines:
                f.write((",".join(line) + "\n").encode())

    def rows_until(self, step):
        """The rows of the file that a run resumed at step will not write again."""
        # A crash may leave anything at the end of a file: half a line, or zeros.
        text = self.path.read_text(encoding="utf-8", errors="replace").replace("\0", "")
        table = csv.DictReader(text.splitlines())
        if tuple(table.fieldnames or ()) != self.FIELDS:
            aside = f"{self.path}.unknown"
            os.replace(self.path, aside)
            print(f"{self.path} was not written by train.py: it is now {aside}")
            return []
        rows = []
        for row in table:
            if is_whole(row) and self.is_before(row, step):
                rows.append({field: row[field] for field in self.FIELDS})
        return rows

    def is_before(self, row, step):
        """A resumed run begins with the evaluation at step, so that row too is written again."""
        row_step = int(row["step"])
        return row_step < step or (row_step == step and not row["val_loss"])

    def elapsed(self):
        """Seconds since the run began, interruptions not counted."""
        return time.perf_counter() - self.start

    def __call__(self, **values):
        """Add a row; values: of any of the FIELDS but elapsed_s."""
        values["elapsed_s"] = f"{self.elapsed():.1f}"
        row = {field: str(values.get(field, "")) for field in self.FIELDS}
        self.rows.append(row)
        with open(self.path, "a", encoding="utf-8", newline="\n") as f:
            f.write(",".join(row.values()) + "\n")
