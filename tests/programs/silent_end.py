"""
train.py, but once training is over the processes can no longer talk: one that has left would
break the connections of one that still reads. Each rank notes its exit status in left-<rank>.
"""

import torch
from leaving import note_on_leaving

import train
from plumbing.errors import run_script

train_normally = train.train


def train_then_silence(*args):
    train_normally(*args)
    torch.distributed.all_reduce = None


train.train = train_then_silence
note_on_leaving("left", lambda status: status)
run_script(train.main)
