"""
train.py with DDP; each rank notes in sent-<rank> how many numbers of its gradients it gave to an
all-reduce in each step.
"""

from leaving import note_on_leaving

import train
from lessons.watch import Messages
from plumbing.errors import run_script

accumulate = train.accumulate_gradients
sent = []


def accumulate_and_count(*args):
    events = []
    with Messages(events):
        loss = accumulate(*args)
    # of an all-reduce between two processes each sends as much as it has, 4 bytes a number
    sent.append(sum(size for _, what, size in events if what == "all-reduce") // 4)
    return loss


train.accumulate_gradients = accumulate_and_count
note_on_leaving("sent", lambda status: " ".join(f"{n:.0f}" for n in sent))
run_script(train.main)
