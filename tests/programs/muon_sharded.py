"""
Under torchrun: Muon on sharded matrices against Muon on whole ones, from the same gradients. Ends
with status 0 if parameters and momentum agree to the bit after every step, over two processes and
over three.
"""

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from plumbing.muon import Muon
from plumbing.processes import joined

# Over three processes these are 5+5+5, 3+3+1, 2+2+0, 1+1+0 and 1+0+0 rows.
SHAPES = [(15, 7), (7, 15), (7, 33), (4, 4), (2, 9), (1, 5), (64, 192)]
SETTINGS = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}
STEPS = 4


class Matrices(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.matrices = torch.nn.ParameterList(torch.randn(shape) for shape in SHAPES)


def compare(mesh):
    whole = list(Matrices().parameters())
    sharded = list(fully_shard(Matrices(), mesh=mesh).parameters())
    plain = Muon(whole, **SETTINGS)
    distributed = Muon(sharded, **SETTINGS)
    for step in range(STEPS):
        torch.manual_seed(1 + step)
        for p, shard in zip(whole, sharded, strict=True):
            p.grad = torch.randn_like(p)
            shard.grad = distribute_tensor(p.grad, mesh, shard.placements)
        plain.step()
        distributed.step()
        for p, shard in zip(whole, sharded, strict=True):
            where = f"step {step}, shape {tuple(p.shape)}, {mesh.size()} processes"
            assert torch.equal(shard.full_tensor(), p), where
            momentum = distributed.state[shard]["momentum_buffer"].full_tensor()
            assert torch.equal(momentum, plain.state[p]["momentum_buffer"]), where


if __name__ == "__main__":
    with joined() as group:
        for n in range(2, group.world + 1):
            mesh = DeviceMesh("cpu", list(range(n)))
            if group.rank < n:
                compare(mesh)
                print(f"equal over {n} processes")
