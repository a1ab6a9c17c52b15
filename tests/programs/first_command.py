"""train.py on a machine that reaches no host and whose standard library is the folder lib/."""

import sysconfig

import prepare_data
import train
from plumbing.errors import run_script

sysconfig.get_paths = lambda *args, **options: {"stdlib": "lib"}
prepare_data.SHAKESPEARE["url"] = "http://127.0.0.1:9/input.txt"
run_script(train.main)
