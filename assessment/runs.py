"""Draws the losses of one run or several, from their metrics.csv, into losses.png."""

import csv
from pathlib import Path

from assessment.plots import figure, set_up_matplotlib
from plumbing.errors import InputError
from plumbing.run_folder import Metrics

PICTURE = "losses.png"
COLOURS = ("#222222", "#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#17becf")
MARKERS = "osvD^P<X"


def read_losses(name):
    """The folder of a run or its metrics.csv -> {column: [(step, loss), ...]} of both losses"""
    path = Path(name)
    if path.is_dir():
        path = path / "metrics.csv"
    if not path.is_file():
        raise InputError(f"{path} does not exist: give the out_dir of a run")
    header, *lines = path.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
    if header != ",".join(Metrics.FIELDS):
        raise InputError(f"{path} was not written by train.py")
    losses = {"train_loss": [], "val_loss": []}
    try:
        for row in csv.DictReader(lines, Metrics.FIELDS):
            if None in row.values():   # a line that is still being written
                continue
            for column, points in losses.items():
                if row[column]:
                    points.append((int(row["step"]), float(row[column])))
    except (ValueError, csv.Error) as e:
        raise InputError(f"{path} is damaged: {e}") from None
    if not losses["val_loss"]:
        raise InputError(f"{path} has no validation loss yet")
    return losses


def main(argv):
    """argv: the folders of the runs"""
    if not argv:
        raise InputError("name the runs to draw: python -m assessment runs out-a out-b")
    runs = {name: read_losses(name) for name in argv}
    set_up_matplotlib()
    fig, ax = figure("Validation loss (markers) and training loss (thin)",
                     ("step", "nats per token"))
    fig.set_size_inches(6.4, 4)
    for i, (name, losses) in enumerate(runs.items()):
        colour = COLOURS[i % len(COLOURS)]
        if losses["train_loss"]:
            steps, values = zip(*losses["train_loss"], strict=True)
            ax.plot(steps, values, color=colour, linewidth=0.6, alpha=0.6)
        steps, values = zip(*losses["val_loss"], strict=True)
        ax.plot(steps, values, color=colour, label=name, linewidth=1.4,
                marker=MARKERS[i % len(MARKERS)], markersize=4)
    ax.legend()
    fig.savefig(PICTURE, dpi=150, bbox_inches="tight")
    print(f"{PICTURE}: {', '.join(argv)}")
