"""train.py, but rank 1 runs in the folder elsewhere/, as on a machine with a disk of its own."""

import os

import train
from plumbing.errors import run_script

if os.environ["RANK"] == "1":
    os.chdir("elsewhere")
run_script(train.main)
