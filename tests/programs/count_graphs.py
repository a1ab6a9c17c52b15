"""train.py; each rank notes in graphs-<rank> how many graphs torch.compile made."""

import torch
from leaving import note_on_leaving

import train
from plumbing.errors import run_script

note_on_leaving("graphs", lambda status: torch._dynamo.utils.counters["stats"]["unique_graphs"])
run_script(train.main)
