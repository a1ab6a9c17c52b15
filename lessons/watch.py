"""
What two processes compute and send in one training step of two micro-batches, in its order:

  torchrun --standalone --nproc_per_node=2 -m lessons.watch ddp      (or fsdp)

Rank 0 prints a JSON list of [kind, what, bytes]. Kinds are forward and backward, of a part of the
model, and send, of one of torch's collective operations, with the bytes that one process sends.
"""

import json
import subprocess
import sys

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import train
from model import GPT, GPTConfig
from plumbing.errors import InputError, run_script
from plumbing.processes import joined

CONFIG = GPTConfig(block_size=16, vocab_size=1000, n_layer=4, n_head=4, n_embd=384)
# What each of N processes sends, as a part of the whole tensor: an all-reduce is a reduce-scatter
# and an all-gather.
OPERATIONS = {
    "_allgather_base_": ("all-gather", lambda N: (N - 1) / N),
    "_reduce_scatter_base_": ("reduce-scatter", lambda N: (N - 1) / N),
    "allreduce_": ("all-reduce", lambda N: 2 * (N - 1) / N),
}


class Messages(TorchDispatchMode):
    """Notes each collective operation."""

    def __init__(self, events):
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("c10d::")
        if name in OPERATIONS:
            what, part = OPERATIONS[name]
            leaves = torch.utils._pytree.tree_leaves(args)
            whole = max(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))
            self.events.append(("send", what, whole * part(dist.get_world_size())))
        return func(*args, **(kwargs or {}))


class NoData:
    def batch(self, numbers):
        x = torch.zeros(len(numbers), CONFIG.block_size, dtype=torch.int64)
        return x, x


def note(events, module, name):
    module.register_forward_pre_hook(lambda *_: events.append(("forward", name, 0)))
    module.register_full_backward_pre_hook(lambda *_: events.append(("backward", name, 0)))


def watch(mode, group):
    """The events of train.accumulate_gradients on this process"""
    model = GPT(CONFIG)
    c = train.TrainConfig(batch_size=4, micro_batch_size=1, compile=False)
    place = train.Place(torch.device("cpu"), bf16=False, rank=group.rank, world=group.world,
                        micro=1, mode=mode)
    net = train.wrap(model, c, place)
    events = []
    note(events, model.wte, "embed")
    for i, block in enumerate(model.h):
        note(events, block, f"block {i}")
    note(events, model.lm_head, "head")
    with Messages(events):
        train.accumulate_gradients(0, net, NoData(), c, place)
    return events


def watched_step(mode):
    """The same, from two processes that are started for it"""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "-m", "lessons.watch", mode]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    if done.returncode != 0:
        raise InputError(f"{' '.join(command)} failed: {done.stderr}")
    return json.loads(done.stdout)


def main(argv):
    if argv not in (["ddp"], ["fsdp"]):
        raise InputError(f"lessons.watch {' '.join(argv)}: expected ddp or fsdp")
    with joined() as group:
        if group.world != 2:
            raise InputError("lessons.watch needs two processes: torchrun --standalone "
                             f"--nproc_per_node=2 -m lessons.watch {argv[0]}")
        events = watch(argv[0], group)
        print(json.dumps(events))   # joined() mutes the other processes


if __name__ == "__main__":
    run_script(main)
