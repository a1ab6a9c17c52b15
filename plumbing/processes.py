"""
Several processes: start together, decide together, end together.

Tensors travel by torch.distributed. Errors, and decisions that may take long, travel by the store:
a table of keys and values that torchrun keeps and every process reads and writes. Once all have
met, waiting for them has no time limit, and a process that waits notices when another one fails.

torchrun (2.13) keeps its store when it restarts failed processes (pytorch/pytorch#135712), and with
it the addresses of the dead ones. So the processes of every start first agree on a fresh prefix for
all other keys: a random name, here 5f, that rank 0 gives itself. Rank 1's is a0:

    rank 0                   the store           rank 1
    writes its name    -->   rank 0: 5f
                             rank 1: a0          <--   writes its name
    reads it           <--
    answers with 5f    -->   name for a0: 5f     -->   waits for the answer to its own name
    sees all confirm   <--   5f reached 1: ""    <--   confirms

If `rank 1` still holds the name of a dead process, nobody confirms rank 0's answer to it; rank 0
reads `rank 1` again and answers again until the new process has written its name there.

    key, after the prefix     value
    end                       number of processes that have arrived there
    call 7, turn 0            the same, in the 7th call of rank0_first or decide_on_rank0
    call 8                    what rank 0 decided, as JSON
    failed                    number of processes that have failed
    why                       what the first of them says; all report it to torchrun
"""

import json
import os
import signal
import sys
import time
import uuid
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from plumbing.errors import InputError, explain, first_line, report

FROM_TORCHRUN = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
POLL_SECONDS = 0.02
HALF_AN_HOUR = 1800


@dataclass
class Group:
    """The processes of a run. The defaults stand for one process alone."""
    store: dist.Store | None = None   # None outside torchrun
    rank: int = 0                     # of this process
    world: int = 1                    # number of processes
    calls: int = 0                    # of rank0_first and decide_on_rank0 so far

    @property
    def under_torchrun(self):
        return self.store is not None

    def next_key(self):
        """A fresh key for one call; ranks get the same one because they make the same calls."""
        self.calls += 1
        return f"call {self.calls}"


@contextmanager
def joined():
    """
    `with joined() as group`: outside torchrun, Group() and nothing else. Under torchrun the
    processes meet, and the end of the block is the end of this process: nothing after it runs,
    neither here nor in a caller. Its exit status is 1 if any process failed, else 0.
    """
    if "RANK" not in os.environ:
        yield Group()
        return
    group = join()
    status = 1
    try:
        yield group
        # a process that exits early breaks connections its peers still use
        wait_for_all(group, "end")
        status = 0
    except SystemExit as e:   # of --help
        status = e.code
    except BaseException as e:
        first_to_fail(group, e)
    finally:
        leave(status)


def join():
    """Meet the processes that torchrun started -> Group. Only rank 0 prints from here on."""
    missing = [name for name in FROM_TORCHRUN if name not in os.environ]
    if missing:
        raise InputError(
            f"RANK is set without {', '.join(missing)}: start several processes with torchrun, "
            "which sets all of these; for a single process, unset RANK"
        )
    try:
        store, rank, world = next(rendezvous("env://"))
    except ValueError as e:
        raise InputError(
            f"the environment does not say how to meet the other processes: {first_line(e)}; start "
            "them with torchrun, which sets it"
        ) from None
    store = dist.PrefixStore(agree(store, rank, world), store)
    # Both backends by name: all_reduce() sends CPU tensors, DDP and FSDP send GPU tensors, and
    # without names torch makes a backend for only one of them.
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
    # The others wait while rank 0 writes a checkpoint. To a slow disk that may take longer than
    # NCCL's default of 10 minutes. Two hours are as good as no limit: when a process fails,
    # torchrun ends all.
    dist.init_process_group(backend, store=store, rank=rank, world_size=world,
                            timeout=timedelta(hours=2))
    if rank > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    return Group(store, rank, world)


def agree(store, rank, world):
    """-> a fresh prefix for keys, the same on all ranks: rank 0's name. See the drawing above."""
    own_name = uuid.uuid4().hex
    store.set(f"rank {rank}", own_name)
    if rank > 0:
        prefix = store.get(f"name for {own_name}").decode()   # waits until there is one
        store.set(f"{prefix} reached {rank}", "")
        return prefix
    others = range(1, world)
    deadline = time.monotonic() + HALF_AN_HOUR
    while not store.check([f"{own_name} reached {r}" for r in others]):
        for r in others:
            if store.check([f"rank {r}"]):
                name = store.get(f"rank {r}").decode()
                store.set(f"name for {name}", own_name)
        time.sleep(POLL_SECONDS)
        if time.monotonic() > deadline:
            raise InputError(
                f"not all of the {world} processes started within half an hour: look for errors in "
                "the output of the others"
            )
    return own_name


def leave(status):
    """End this process at once: taking down gloo or a broken NCCL may hang or abort (torch 2.13)"""
    try:
        sys.stdout.flush()
    finally:
        os._exit(status)


def wait_until(group, condition):
    """Poll condition() until it is true; InputError if another process fails meanwhile."""
    while not condition():
        if group.store.check(["why"]):
            raise InputError("another process failed")   # and has said why
        # All processes may wait for hours while one of them downloads: in all they ask the store
        # at most 2,000 times a second, however many they are.
        time.sleep(max(POLL_SECONDS, group.world / 1000))


def wait_for_all(group, where):
    """
    Return when every process has called this with the same where, which names one place and moment.
    It only counts in the store: a barrier has a time limit and needs all connections intact.
    """
    group.store.add(where, 1)
    wait_until(group, lambda: group.store.add(where, 0) >= group.world)   # adding 0 reads it


def rank0_first(group, work):
    """
    work() on rank 0, then on the first process of each other machine, then on the rest; returns its
    result. So one process per machine downloads or builds what the others then find.
    """
    if group.store is None:
        return work()
    if group.rank == 0:
        own_turn = 0
    elif os.environ["LOCAL_RANK"] == "0":
        own_turn = 1
    else:
        own_turn = 2
    key = group.next_key()
    for turn in range(3):
        if turn == own_turn:
            result = work()
        wait_for_all(group, f"{key}, turn {turn}")
    return result


def decide_on_rank0(group, work):
    """
    Only rank 0 calls work(); all ranks return its result as JSON keeps it: tuples become lists,
    even if there is only one process.
    """
    if group.store is None:
        return json.loads(json.dumps(work()))
    key = group.next_key()
    if group.rank == 0:
        group.store.set(key, json.dumps(work()))
    wait_until(group, lambda: group.store.check([key]))
    return json.loads(group.store.get(key))


def all_reduce(value, op=dist.ReduceOp.SUM):
    """
    The sum (or another op) of a number or bool over all processes, as a float; of one process, its
    value as it is. It is sent from the CPU, so that nobody waits for a GPU.
    """
    if not dist.is_initialized():
        return value
    result = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(result, op)
    return result.item()


class AnyRank:
    """
    Whether any process has raised a flag. send() starts an all-reduce that goes on during the next
    step, and read() returns its result: the answer is one step old, but nobody waits for it. (With
    16 processes on one machine, waiting takes 5 ms a step.) A process alone gets its own flags.
    """

    def __init__(self):
        self.sent = None   # the flags on their way, and the all-reduce that brings them

    def read(self, *flags, now):
        """
        The answer to the last send() as a tuple of bools, all False before the first.
        now: send these flags and wait for their answer instead
        """
        if not dist.is_initialized():
            return flags
        if self.sent is not None:
            self.sent[1].wait()
        if now:
            self.send(*flags)
            self.sent[1].wait()
        if self.sent is None:
            return (False,) * len(flags)
        return tuple(bool(vote) for vote in self.sent[0].tolist())

    def send(self, *flags):
        """All processes must call this equally often, and read() in between."""
        if dist.is_initialized():
            votes = torch.tensor(flags, dtype=torch.int32)
            self.sent = votes, dist.all_reduce(votes, dist.ReduceOp.MAX, async_op=True)


def mesh_of_processes(device_type):
    """
    How FSDP spreads a model: over all processes; or, on several machines with several processes
    each, over those of one machine, with a copy on every machine. Connections inside a machine are
    the faster ones, and parameters then never leave it: only gradients do, once a step.
    """
    world = dist.get_world_size()
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    same_everywhere = all_reduce(here, dist.ReduceOp.MIN) == all_reduce(here, dist.ReduceOp.MAX)
    if same_everywhere and 1 < here < world:
        return dist.init_device_mesh(device_type, (world // here, here),
                                     mesh_dim_names=("copies", "shards"))
    return dist.init_device_mesh(device_type, (world,), mesh_dim_names=("shards",))


def make_copies_equal(model, mesh):
    """
    If there are copies, give each the weights of the first: on machines of other kinds they may
    have been built with other last bits. (DDP sees to this by itself.)
    """
    if mesh.ndim == 2:
        for p in model.parameters():
            dist.broadcast(p.data.to_local(), group=mesh.get_group("copies"), group_src=0)


def first_to_fail(group, e):
    """
    Called by every process that cannot go on. The first prints why on stderr, and all report that
    to torchrun, which shows it as the cause.
    """
    # If another process was killed, torchrun ends this one by SIGTERM; but this must be said first.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    line = explain(e)
    try:
        if group.store.add("failed", 1) == 1:
            print(line, file=sys.stderr)
            group.store.set("why", line)
        report(group.store.get("why").decode())
    except RuntimeError:
        # The store is gone with the process that kept it, or the first to fail said nothing.
        print(line, file=sys.stderr)
