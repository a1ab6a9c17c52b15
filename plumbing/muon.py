"""
Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): an optimizer for matrices.

The update of a matrix is its momentum with all singular values brought close to 1, so that every
direction moves by about the same amount. It is scaled to the RMS of AdamW's updates (Liu et al.
2025, "Muon is Scalable for LLM Training", section 2.2), so that learning rates and weight decay
mean the same for both.
"""

import math

import torch
import torch.distributed as dist

# Repeated five times, x -> A x + B x^3 + C x^5 takes singular values close to 1 (Jordan et al.).
A, B, C = 3.4445, -4.7750, 2.0315
STEPS = 5


class Muon(torch.optim.Optimizer):
    """
    params        matrices, whole or sharded by FSDP along their rows
    lr            learning rate, as for AdamW
    weight_decay  decoupled, as in AdamW
    momentum      decay of the running mean of gradients (with Nesterov's look-ahead)

    Equal to torch.optim.Muon(adjust_lr_fn="match_rms_adamw"), except that it computes in float32 on
    CPUs, and that under FSDP each matrix is orthogonalised whole, by one process.
    """

    def __init__(self, params, lr, weight_decay, momentum):
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            updates = [self.momentum_update(p, group["momentum"]) for p in params]
            if hasattr(params[0], "to_local"):
                directions = orthogonalize_sharded(params, updates)
            else:
                directions = [orthogonalize(update) for update in updates]
            for p, direction in zip(params, directions, strict=True):
                scale = 0.2 * math.sqrt(max(p.shape))   # the RMS of AdamW's updates is about 0.2
                shard = local(p)
                shard.mul_(1 - group["lr"] * group["weight_decay"])
                shard.add_(direction, alpha=-group["lr"] * scale)

    def momentum_update(self, p, momentum):
        """Add the gradient to the running mean -> the update, this process's rows of it"""
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p.grad)
        gradient = local(p.grad)
        mean = local(state["momentum_buffer"])
        mean.lerp_(gradient, 1 - momentum)
        return gradient.lerp(mean, momentum)


def local(tensor):
    """This process's shard of a tensor, or all of it when it is not sharded. Shares memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def orthogonalize(matrix):
    """
    U S V' -> about U V'. Newton-Schulz steps use only matrix products, and bring all but tiny
    singular values to between 0.7 and 1.2. Computed in bfloat16 on CUDA, else in float32.
    """
    dtype = torch.bfloat16 if matrix.device.type == "cuda" else torch.float32
    X = matrix.to(dtype)
    tall = X.shape[0] > X.shape[1]
    if tall:
        X = X.T                                             # the products below are then smaller
    X = X / X.norm().clamp(min=1e-7)                        # singular values are now at most 1
    for _ in range(STEPS):
        gram = X @ X.T
        polynomial = torch.addmm(gram, gram, gram, beta=B, alpha=C)
        X = torch.addmm(X, polynomial, X, beta=A)           # A X + (B XX' + C (XX')^2) X
    return (X.T if tall else X).to(matrix.dtype)


def orthogonalize_sharded(params, shards):
    """
    The same for matrices whose rows are spread over N processes. shards and the result are the
    rows held here. Each matrix has an owner: one all-to-all brings all its rows there, the owner
    orthogonalises it whole, and a second all-to-all takes the rows back. With N = 2 and matrices
    0, 1, 2 in the order of their sizes, process 0 owns 0 and 2, process 1 owns 1.
    """
    mesh = params[0].device_mesh
    group = mesh.get_group(mesh.ndim - 1)   # each machine orthogonalises its own copy
    N, rank = dist.get_world_size(group), dist.get_rank(group)
    sizes = [shard_sizes(p.shape, N) for p in params]       # sizes[i][r]: of matrix i on process r
    by_size = sorted(range(len(params)), key=lambda i: params[i].numel())
    owned = [by_size[r::N] for r in range(N)]               # owned[r]: which matrices
    mine = owned[rank]
    empty = shards[0].new_empty(0)                          # for owners of nothing

    to_owners = [[shards[i].flatten() for i in owned[r]] for r in range(N)]
    rows = exchange(to_owners, [[sizes[i][r] for i in mine] for r in range(N)], empty, group)
    directions = []
    for n, i in enumerate(mine):
        matrix = torch.cat([rows[r][n] for r in range(N)]).view(params[i].shape)
        directions.append(orthogonalize(matrix).flatten().split(sizes[i]))

    from_owners = [[direction[r] for direction in directions] for r in range(N)]
    own_sizes = [[sizes[i][rank] for i in owned[r]] for r in range(N)]
    rows = exchange(from_owners, own_sizes, empty, group)
    result = list(shards)
    for r in range(N):
        for n, i in enumerate(owned[r]):
            result[i] = rows[r][n].view(shards[i].shape)
    return result


def shard_sizes(shape, N):
    """How many values of a matrix each of N processes holds: FSDP cuts rows as torch.chunk does."""
    rows, columns = shape
    chunk = math.ceil(rows / N)
    return [columns * max(0, min(chunk, rows - r * chunk)) for r in range(N)]


def exchange(outgoing, sizes, empty, group):
    """
    All-to-all. outgoing[r]: the flat tensors for process r, any number of them.
    sizes[r]: the lengths of the tensors that process r sends here -> those tensors, for each r.
    """
    lengths = [sum(len(t) for t in tensors) for tensors in outgoing]
    sent = torch.cat([empty, *(t for tensors in outgoing for t in tensors)])
    totals = [sum(s) for s in sizes]
    received = sent.new_empty(sum(totals))
    dist.all_to_all_single(received, sent, totals, lengths, group=group)
    return [t.split(s) for t, s in zip(received.split(totals), sizes, strict=True)]
