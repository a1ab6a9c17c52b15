"""
Many runs of train.py in one set of processes, because starting processes takes seconds.
The argument is a JSON list of command lines; ["copy", from, to] copies a folder instead.
"""

import json
import shutil
import sys

import train
from plumbing.processes import joined, wait_for_all
from plumbing.settings import read_settings

train.GPT.generate = lambda self, idx, *args, **options: idx   # no sample at the end of each run

with joined() as group:
    for number, argv in enumerate(json.loads(sys.argv[1])):
        if argv[0] == "copy":
            if group.rank == 0:
                shutil.copytree(argv[1], argv[2])
        else:
            (c, gpt_config), given = read_settings(argv, "", train.TrainConfig, train.GPTConfig)
            train.train(c, gpt_config, given, argv, group)
        wait_for_all(group, f"run {number}")
