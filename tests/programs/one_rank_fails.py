"""train.py, but the fifth training call of rank 1's model goes wrong; argument 1 says how."""

import os
import sys

import train
from plumbing.errors import InputError, run_script

fault = sys.argv.pop(1)
forward = train.GPT.forward
training_calls = 0


def faulty_forward(self, *args, **options):
    global training_calls
    logits, loss = forward(self, *args, **options)
    training_calls += self.training
    if os.environ["RANK"] == "1" and self.training and training_calls == 5:
        if fault == "error":
            raise InputError("only here")
        if fault == "memory":
            raise MemoryError
        loss = loss * float("nan")
    return logits, loss


train.GPT.forward = faulty_forward
run_script(train.main)
