"""
The bytes that each process holds when it trains alone, with DDP or with FSDP:

  python -m assessment.held config/shakespeare.py
  torchrun --standalone --nproc_per_node=2 -m assessment.held config/shakespeare.py --fsdp

The settings are those of train.py. This sets up the run as train.py does, does one step, and prints
a line of JSON per process: its rank, and the bytes of the parameters, gradients and optimizer state
that it holds itself; of sharded tensors, those of its shard.
"""

import json
import os
import sys

import train
from model import GPTConfig
from plumbing.errors import InputError, run_script
from plumbing.processes import joined
from plumbing.settings import read_settings


def local_bytes(tensors):
    total = 0
    for tensor in tensors:
        if hasattr(tensor, "to_local"):   # sharded by FSDP
            tensor = tensor.to_local()
        total += tensor.nbytes
    return total


def optimizer_tensors(optimizers):
    for optimizer in optimizers:
        for state in optimizer.state.values():
            yield from state.values()


def main(argv):
    (c, gpt_config), given = read_settings(argv, __doc__, train.TrainConfig, GPTConfig)
    if c.fsdp and "RANK" not in os.environ:
        raise InputError("--fsdp shards a model across several processes: start them with torchrun")
    with joined() as group:
        run = train.set_up(c, gpt_config, given, group)
        model, optimizers = run.model, run.optimizers
        train.accumulate_gradients(0, run.net, run.train_data, run.c, run.place)
        gradients = local_bytes(p.grad for p in model.parameters())
        for optimizer in optimizers:
            optimizer.step()
        held = {
            "rank": group.rank,
            "parameters": local_bytes(model.parameters()),
            "gradients": gradients,
            "optimizer": local_bytes(optimizer_tensors(optimizers)),
        }
        # joined() mutes sys.stdout of the others; one write, so that lines do not mix
        sys.__stdout__.write(json.dumps(held) + "\n")
        sys.__stdout__.flush()


if __name__ == "__main__":
    run_script(main)
