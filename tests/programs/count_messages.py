"""train.py with DDP; each rank notes in sent-<rank> how often it sent its gradients."""

from leaving import note_on_leaving
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import train
from plumbing.errors import run_script

create = DistributedDataParallel.__init__
sent = []


def send(state, bucket):
    sent.append(1)
    return allreduce_hook(state, bucket)


def create_and_count(self, *args, **options):
    create(self, *args, **options)
    self.register_comm_hook(None, send)


DistributedDataParallel.__init__ = create_and_count
note_on_leaving("sent", lambda status: len(sent))
run_script(train.main)
