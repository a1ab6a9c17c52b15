"""train.py, but preparing data/tiny takes a second, and leaves a note of the rank that did it."""

import os
import time
from pathlib import Path

import prepare_data
import train
from plumbing.errors import run_script


def prepare(name, **options):
    with open("prepared.txt", "a") as f:
        f.write(os.environ["RANK"])
    time.sleep(1)
    prepare_data.prepare_text(Path("data/tiny"), ["text.txt"], "char")


prepare_data.prepare = prepare
run_script(train.main)
