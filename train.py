"""
Train a GPT: one loop for one process, for copies of the model (DDP) and for a model cut over processes (FSDP).

  python train.py config/shakespeare.py                        from scratch, in half a minute on two cores
  python train.py config/shakespeare.py --init_from=resume     go on from the last checkpoint in out_dir
  python train.py config/shakespeare.py --init_from=resume --eval_only    the validation loss of that checkpoint
  python train.py config/shakespeare.py --learning_rate=1e-3   a flag wins over a file, a later file over an earlier one
  python train.py config/finetune_shakespeare.py               start from the released GPT-2
  python train.py --help                                       every setting, its default and its meaning

  torchrun --nproc_per_node=8 train.py                         GPT-2 124M on 8 GPUs, DDP
  torchrun --nproc_per_node=8 train.py config/gpt2_xl.py --fsdp         GPT-2 1558M on 8 GPUs, FSDP

  alone    one process holds the model and computes the batch
  DDP      (DistributedDataParallel) each holds the model and computes a share of the batch; the gradients are averaged once a step
  FSDP     (fully sharded) each holds 1/N of every tensor and computes a share of the batch; a block's parameters are fetched
           before its forward and again before its backward pass, its gradients averaged and cut. README, "More than one process"

Settings are the fields of TrainConfig and of model.GPTConfig; a config file is plain Python that sets some.
"""

import functools
import math
import os
import shlex
import signal
import sys
import time
import zlib
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recompute   # a checkpoint is a file here

import launch
import weights
from launch import across, clock
from model import GPT, GPTConfig, InputError
from prepare_data import FINEWEB_SHARDS, SHARD_TOKENS, Data, Tokenizer, load_meta, prepare


@dataclass
class TrainConfig:
    """Everything but the shape of the model. The defaults train GPT-2 124M on 10 billion tokens of FineWeb."""
    out_dir: str = "out"                # ckpt.pt, best.pt and metrics.csv go here
    dataset: str = "fineweb"            # folder in data/; prepared if missing, where prepare_data.py knows the name
    init_from: str = "scratch"          # scratch, resume, auto (resume if out_dir has a ckpt.pt), gpt2[-medium|-large|-xl], or a folder
    batch_size: int = 512               # sequences in one optimizer step, over all processes
    micro_batch_size: int = 16          # sequences a process holds at once; gradients accumulate until its share is full
    max_iters: int = 19073              # optimizer steps
    learning_rate: float = 6e-4         # the highest: reached after warm-up
    min_lr: float | None = None         # the lowest: reached at lr_decay_iters; None = learning_rate / 10
    warmup_iters: int = 700             # steps of linear warm-up
    lr_decay_iters: int | None = None   # step at which the cosine ends; None = max_iters
    optimizer: str = "adamw"            # adamw, or muon: Muon for the matrices inside the blocks, AdamW for the rest
    weight_decay: float = 0.1           # on matrices only
    beta1: float = 0.9                  # decay of the running mean of gradients; with muon also its momentum
    beta2: float = 0.95                 # AdamW: decay of the running mean of squared gradients
    grad_clip: float = 1.0              # gradients are scaled down to at most this norm over all parameters; 0 = as they are
    eval_interval: int = 250            # steps between evaluations, each followed by a checkpoint
    eval_iters: int = 20                # validation batches (of batch_size) in an evaluation; the whole split if it has fewer
    eval_only: bool = False             # evaluate once and stop
    log_interval: int = 10              # steps between lines
    checkpoint_interval: int = 1000     # steps between checkpoints besides those of evaluations
    checkpoint_minutes: float = 30.0    # and the longest time between two
    fsdp: bool = False                  # under torchrun: cut the model over the processes instead of copying it to each
    reshard_after_forward: bool = True  # FSDP: let go of a block after its forward pass; False = less sent, more memory
    checkpoint_activations: bool = False   # compute the inside of a block again in the backward pass instead of keeping it
    device: str = "auto"                # auto, cuda, cuda:1, mps, cpu
    dtype: str = "auto"                 # bfloat16 (matrix products only, weights stay float32) or float32; auto = what is fast here
    compile: bool | None = None         # torch.compile; None = where it pays: on CUDA
    seed: int = 1337                    # of the weights, the order of the data, and dropout

    def __post_init__(self):
        for name in ("batch_size", "micro_batch_size", "eval_interval", "eval_iters", "log_interval", "checkpoint_interval"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("max_iters", "warmup_iters", "learning_rate", "weight_decay", "grad_clip", "checkpoint_minutes", "seed"):
            if not 0 <= getattr(self, name) < 2**32:
                raise InputError(f"{name}={getattr(self, name)}: must be at least 0 and less than 2**32")
        if not self.out_dir or not self.dataset:
            raise InputError(f"out_dir={self.out_dir!r}, dataset={self.dataset!r}: neither may be empty")
        if self.min_lr is not None and not 0 <= self.min_lr <= self.learning_rate:
            raise InputError(f"min_lr={self.min_lr}: must be at least 0 and at most learning_rate={self.learning_rate}")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise InputError(f"beta1={self.beta1}, beta2={self.beta2}: both must be at least 0 and less than 1")
        for name, choices in dict(dtype=("auto", "float32", "bfloat16"), optimizer=("adamw", "muon")).items():
            if getattr(self, name) not in choices:
                raise InputError(f"{name}={getattr(self, name)!r}: must be {' or '.join(choices)}")


def load_config(argv):
    """Config files and flags -> TrainConfig, GPTConfig; see launch.settings"""
    return launch.settings(argv, __doc__, TrainConfig, GPTConfig)[:2]


# ----------------------------------------------------------------------------------------------------------------------
# The pieces of the loop

def wrap(model, c, micro, bf16, autocast, device):
    """Set up the mode: alone, DDP or FSDP -> the module that the loop calls in place of the model"""
    if c.checkpoint_activations:
        for block in model.h:
            block.forward = functools.partial(recompute, block.forward, use_reentrant=False)
    if c.compile or c.compile is None and device.type == "cuda":
        lacks = launch.why_no_compiler(device)
        if across(lacks is not None):
            print(f"torch.compile failed, going on without it: {lacks or 'on another machine'}")
        else:
            print("torch.compile: the first steps take up to a few minutes")
            torch._dynamo.config.recompile_limit = 8 + 2 * len(model.h)   # blocks share their code, each window compiles it anew
            for part in model.h if c.fsdp else [model]:   # FSDP puts its work between the blocks
                part.forward = torch.compile(part.forward)

    if c.fsdp:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard   # here: importing it takes half a second
        mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else MixedPrecisionPolicy()
        # In place: the model stays the object it was, but its parameters are now DTensors, each rank's part of them
        # (full_tensor() joins the parts), and it gains reshard() and set_requires_gradient_sync().
        for block in model.h:   # moved to the device and cut one by one: no device ever holds all
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=c.reshard_after_forward)
        return fully_shard(model, mesh=mesh, mp_policy=policy)   # what is left, embedding and tied head in one group
    model.to(device)
    if not dist.is_initialized():
        return model
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    if not c.eval_only:
        # DDP sums gradients in buckets, and after its first backward pass it groups them anew, which changes the rounding: spend
        # that pass now, on zeros, so that a resumed run equals an uninterrupted one bit for bit.
        idx = torch.zeros(micro, model.config.block_size, dtype=torch.int64, device=device)
        with autocast:
            loss = ddp(idx, idx)[1]
        loss.backward()
        ddp.zero_grad(set_to_none=False)
    return ddp


def lr_at(step, c):
    """The learning rate after step steps: linear warm-up, half a cosine down to min_lr at lr_decay_iters, then min_lr."""
    end = c.max_iters if c.lr_decay_iters is None else c.lr_decay_iters
    lowest = c.learning_rate / 10 if c.min_lr is None else c.min_lr
    if step < c.warmup_iters:
        return c.learning_rate * (step + 1) / (c.warmup_iters + 1)
    if step >= end:
        return lowest
    progress = (step - c.warmup_iters) / (end - c.warmup_iters)
    return lowest + 0.5 * (1 + math.cos(math.pi * progress)) * (c.learning_rate - lowest)


def make_optimizers(model, c, device):
    """
    AdamW alone, or with Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon), which makes the mean gradient of a matrix
    (q, k and v count as one) orthogonal: a step of one length in every direction, by match_rms_adamw of the size of AdamW's.
    Decay pulls matrices and embeddings towards zero; biases and layer norms have no reason to be small.
    """
    inner = {p: None for p in model.h.parameters() if p.dim() == 2 and c.optimizer == "muon"}   # an ordered set: tensors hash by identity
    rest = [p for p in model.parameters() if p not in inner]
    groups = [dict(params=[p for p in rest if p.dim() >= 2], weight_decay=c.weight_decay),
              dict(params=[p for p in rest if p.dim() < 2], weight_decay=0.0)]
    optimizers = [torch.optim.AdamW(groups, c.learning_rate, betas=(c.beta1, c.beta2), fused=device.type != "mps")]
    if inner:
        optimizers.append(torch.optim.Muon(list(inner), c.learning_rate, c.weight_decay, momentum=c.beta1, adjust_lr_fn="match_rms_adamw"))
    return optimizers


@torch.no_grad()
def evaluate(net, data, c, micro, autocast, device, rank=0, world=1):
    """Mean loss, nats a token, over the first eval_iters*batch_size windows, the same each time. Every rank takes part, and gets it."""
    net.eval()
    n, total = min(data.n, c.eval_iters * c.batch_size), 0.0
    for first in range(0, n, micro * world):   # every rank calls equally often: FSDP fetches parameters with all of them
        mine = range(first + rank * micro, first + (rank + 1) * micro)
        counted = sum(i < n for i in mine)
        x, y = data.windows([min(i, n - 1) for i in mine])
        y[counted:] = -1   # padding, not counted; a smaller batch would make torch.compile compile again
        with autocast:
            loss = net(x.to(device), y.to(device))[1]
        total += loss.item() * counted if counted else 0.0
    if c.fsdp:   # no backward pass has let go of what was fetched last, and save needs the parts
        for part in (*net.h, net):
            part.reshard()
    net.train()
    return across(total) / n


def load_optimizers(optimizers, model, states, path):
    """Put back the state of every parameter, saved by its name, and cut it as the parameter is cut; ValueError if it is another model's."""
    names = {p: name for name, p in model.named_parameters()}
    if states.keys() != set(names.values()):
        raise InputError(f"{path}: the optimizer's state is not of this model")

    def cut(t, p):
        if t.dim() == 0 or not hasattr(p, "full_tensor"):
            return t
        from torch.distributed.tensor import distribute_tensor
        return distribute_tensor(t.to(p.device), p.device_mesh, p.placements, src_data_rank=None)   # each rank has read it all
    for optimizer in optimizers:
        order = [p for group in optimizer.param_groups for p in group["params"]]   # as torch numbers them
        state = {i: {k: cut(t, p) for k, t in states[names[p]].items()} for i, p in enumerate(order)}
        optimizer.load_state_dict(dict(state=state, param_groups=optimizer.state_dict()["param_groups"]))


def build_model(c, asked, given, meta):
    """
    A model as init_from says, and the checkpoint if it is to be resumed, else None. asked: the GPTConfig of files and flags; given:
    the names that they set. c.init_from becomes what the checkpoints to come should say: how the run began.
    """
    path, checkpoint = Path(c.out_dir) / "ckpt.pt", None
    if c.init_from == "scratch" or c.init_from == "auto" and not path.exists():
        if "vocab_size" not in given:   # what the tokenizer has
            asked = replace(asked, vocab_size=meta["vocab_size"])
        if asked.vocab_size < meta["vocab_size"]:
            raise InputError(f"vocab_size={asked.vocab_size} is less than the {meta['vocab_size']} ids of data/{c.dataset}")
        c.init_from = "scratch"
        return GPT(asked), None

    if c.init_from in ("resume", "auto"):
        if not path.exists():
            old = ", ".join(map(str, path.parent.glob("old*/ckpt.pt")))
            raise InputError(f"{path} does not exist: nothing to resume; --init_from=scratch starts, auto does what is possible"
                             f"{f'; an earlier run was moved to {old}' if old else ''}")
        checkpoint = weights.load_checkpoint(path)
        model = GPT(replace(GPTConfig(**checkpoint["gpt_config"]), dropout=asked.dropout))
        model.tokenizer = checkpoint["tokenizer"]
        weights.copy(model, checkpoint.pop("model"), path)
        started = checkpoint["train_config"].get("init_from")
        if (trained_with := checkpoint["train_config"].get("optimizer", "adamw")) != c.optimizer:
            raise InputError(f"{path} was trained with optimizer={trained_with}, whose averages {c.optimizer} cannot use: "
                             f"--optimizer={trained_with} goes on")
        # what the settings ask of the shape must be there: all of it if the run began from scratch, else what was given
        wanted = {f.name: getattr(asked, f.name) for f in fields(asked) if f.name in given or
                  (started == "scratch" and f.name != "vocab_size")}
        changed = [f"{k} was {v}, is {getattr(c, k)}" for k, v in checkpoint["train_config"].items()
                   if k not in ("init_from", "eval_only") and getattr(c, k, v) != v]
        c.init_from = started
        print(f"resuming {path} at step {checkpoint['step']:,}{'; note: ' + ', '.join(changed) if changed else ''}")
    else:   # someone's weights: what is not asked for is as they are, dropout apart
        path = c.init_from
        wanted = {f.name: getattr(asked, f.name) for f in fields(asked) if f.name in given | {"dropout"}}
        fixed = ("vocab_size", "n_layer", "n_head", "n_embd", "bias", "tied")
        model = GPT.from_pretrained(path, **{k: v for k, v in wanted.items() if k not in fixed})
    if other := [f"{k} is {getattr(model.config, k)} there, not {v}" for k, v in wanted.items() if getattr(model.config, k) != v]:
        raise InputError(f"{path} has another architecture: {', '.join(other)}")
    if model.tokenizer not in (None, meta["tokenizer"]) or model.config.vocab_size < meta["vocab_size"]:
        raise InputError(f"{path} was trained with another tokenizer than data/{c.dataset} has: its ids mean other text; prepare yours "
                         f"with the same one (GPT-2's: --tokenizer gpt2)")
    return model, checkpoint


def check_finite(step, name, value):
    """ValueError for a loss or norm that is infinite or not a number"""
    if not math.isfinite(value):
        raise InputError(f"step {step}: {name} {value}. Nothing was overwritten, the last checkpoint is from before; a lower "
                         f"learning_rate, a longer warm-up or dtype=float32 may help")


# ----------------------------------------------------------------------------------------------------------------------
# Training

def train(c, gpt_config, given, argv, store, rank, world):
    mine = zlib.crc32(repr((replace(c, out_dir="any"), gpt_config)).encode())   # a config file may choose by what it finds here
    if across(mine, dist.ReduceOp.MAX) != across(mine, dist.ReduceOp.MIN):
        raise InputError("not all processes read the same settings: give as flags what the config file decides by itself")
    device, bf16, line = launch.choose_device(c.device, c.dtype)
    print(line)
    c.dtype = "bfloat16" if bf16 else "float32"   # resolved, so that a resumed run can tell whether it is another
    autocast = torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")   # TF32 for what is still float32

    share = c.batch_size // world   # of this process, in every step
    micro = max(1, min(c.micro_batch_size, share))
    if c.batch_size % (micro * world):
        raise InputError(f"batch_size={c.batch_size} cannot be shared by {world} process(es) in parts of {micro} sequences: change batch_size, "
                         f"micro_batch_size={c.micro_batch_size} or the number of processes")

    folder = Path("data") / c.dataset
    def load():
        if not (folder / "meta.json").exists():
            tokens = c.max_iters * c.batch_size * gpt_config.block_size
            prepare(c.dataset, shards=min(FINEWEB_SHARDS, math.ceil(tokens / SHARD_TOKENS)) or 1)
        meta = load_meta(folder)
        torch.manual_seed(c.seed)
        return meta, *build_model(c, gpt_config, given, meta)
    meta, model, checkpoint = launch.in_turn(store, load)
    model.train()
    block_size = model.config.block_size
    # for short sequences in bfloat16 on a CPU, torch 2.13's flash attention takes twice the time of plain products, or more
    shortest = min(filter(None, (block_size, *model.config.windows)))
    torch.backends.cuda.enable_flash_sdp(not (bf16 and device.type == "cpu" and shortest < 256))   # despite its name, of the CPU too
    train_data, val_data = (Data(folder, meta, split, block_size, c.seed) for split in ("train", "val"))
    tokens_per_step = c.batch_size * block_size
    switches = [name for name in ("rope", "gqa", "swa") if getattr(model.config, f"use_{name}")]
    print(f"model: {'+'.join(switches) or 'gpt2'}, {model.num_params() / 1e6:.2f}M parameters; "
          f"data: {folder}, {train_data.n * block_size:,} training tokens")
    print(f"batch: {c.batch_size} sequences = {share // micro} accumulation step(s) x {micro} x {world} process{'es' if world > 1 else ''}; "
          f"{tokens_per_step:,} tokens a step, {c.max_iters:,} steps, {c.max_iters * c.batch_size / train_data.n:.2g} epochs")

    # one process, DDP or FSDP; then the optimizer, which must see the parameters as they are cut; and where we are
    flops = model.flops_per_token(block_size)
    net = wrap(model, c, micro, bf16, autocast, device)
    optimizers = make_optimizers(model, c, device)
    step, best_val_loss = 0, math.inf
    if checkpoint:
        load_optimizers(optimizers, model, checkpoint["optimizer"], Path(c.out_dir) / "ckpt.pt")
        step, best_val_loss = checkpoint["step"], checkpoint["best_val_loss"]
        del checkpoint
    if across(step, dist.ReduceOp.MAX) != step:
        raise InputError(f"{c.out_dir} is at step {step} here and further elsewhere: it must be one folder that all machines share")

    def validate():
        return evaluate(net, val_data, c, micro, autocast, device, rank, world)
    if c.eval_only:
        print(f"validation loss {validate():.4f}")
        return
    out = Path(c.out_dir)
    if rank == 0:
        launch.make_out_dir(out, keep=step > 0)
        log = launch.Log(out / "metrics.csv", resume_step=step or None)

    stop = []   # the first SIGINT or SIGTERM ends the run after the step it is in
    def on_signal(number, frame):
        stop.append(signal.Signals(number).name)
        if store is None:   # torchrun says that it received a signal
            os.write(2, b"finishing this step; Ctrl-C once more stops at once\n")   # print is not safe here
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)   # schedulers send it to torchrun and to us: it arrives twice
    handlers = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}

    def save_as(name):
        weights.save_checkpoint(out / name, model, optimizers, c, step, best_val_loss, meta["tokenizer"])

    peak = launch.peak_flops(torch.cuda.get_device_name()) if bf16 and device.type == "cuda" else None
    first_step, counted_from, train_seconds = step, step, 0.0   # evaluations and checkpoints do not count
    start = saved_at = running_since = time.perf_counter()
    lr, loss, norm = 0.0, torch.zeros(()), torch.zeros(())   # of the last step
    while True:
        # One question to all, for a signal may come at any moment, to any process: if each decided alone, one would save while
        # another trains on, and both would wait forever.
        due = time.perf_counter() - saved_at > 60 * c.checkpoint_minutes
        wish = across(2 if stop else 1 if due else 0, dist.ReduceOp.MAX)   # 2 stop, 1 save, 0 go on: the largest of all processes
        stopping = wish == 2
        evaluating = not stopping and (step % c.eval_interval == 0 or step >= c.max_iters)
        saving = evaluating or wish > 0 or step % c.checkpoint_interval == 0
        logging = stopping or step % c.log_interval == 0 or step >= c.max_iters
        if saving or logging:   # only here: reading a number waits until the GPU has computed it
            mean_loss = across(loss.item()) / world
            check_finite(step, "loss", mean_loss)
            check_finite(step, "gradient norm", norm.item())
            train_seconds += time.perf_counter() - running_since
            if logging and step > counted_from and rank == 0:
                speed = (step - counted_from) * tokens_per_step / train_seconds
                mfu = f" | MFU {speed * flops / (peak * world):.1%}" if peak else ""
                left = clock((time.perf_counter() - start) / (step - first_step) * (c.max_iters - step))
                print(f"step {step:,}/{c.max_iters:,} | loss {mean_loss:.4f} | lr {lr:.2e} | norm {norm.item():.2f} | "
                      f"{speed:,.0f} tokens/s{mfu} | {left} left")
                log(step=step, tokens=step * tokens_per_step, train_loss=f"{mean_loss:.6f}", lr=f"{lr:.6g}",
                    grad_norm=f"{norm.item():.6g}", tokens_per_s=f"{speed:.0f}")
                train_seconds, counted_from = 0.0, step
            if evaluating:
                val_loss = validate()
                check_finite(step, "validation loss", val_loss)
                print(f"step {step:,}: validation loss {val_loss:.4f}{', the best so far' if val_loss < best_val_loss else ''}")
                if rank == 0:
                    log(step=step, tokens=step * tokens_per_step, val_loss=f"{val_loss:.6f}")
                if val_loss < best_val_loss:
                    best_val_loss = val_loss
                    save_as("best.pt")
            if saving and step > first_step:
                save_as("ckpt.pt")
                saved_at = time.perf_counter()
            if stopping or step >= c.max_iters:
                break
            running_since = time.perf_counter()

        # dropout depends on seed, step, rank and world size alone: nothing to save; neighbouring seeds lie a million steps apart
        torch.manual_seed((c.seed * 1_000_003 + step) * world + rank)
        lr = lr_at(step, c)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = lr
        loss = torch.zeros((), device=device)
        begin = step * c.batch_size + rank * share
        for first in range(begin, begin + share, micro):
            last = first + micro == begin + share   # send gradients with the last part alone; to be set before its forward pass
            if c.fsdp:
                model.set_requires_gradient_sync(last)
            elif net is not model:   # DDP; its no_sync() sets the same
                net.require_backward_grad_sync = last
            x, y = train_data.batch(range(first, first + micro))
            if device.type == "cuda":   # from pinned memory: the CPU goes on while the GPU fetches it (Apple GPUs lose data so)
                x, y = (t.pin_memory().to(device, non_blocking=True) for t in (x, y))
            x, y = x.to(device), y.to(device)
            with autocast:
                # the mean over this process's share, which DDP and FSDP average; [1] at once: a name would keep the logits in memory
                micro_loss = net(x, y)[1] * (micro / share)
            micro_loss.backward()
            loss += micro_loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip or math.inf)   # inf: measure only
        norm = norm.full_tensor() if c.fsdp else norm
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=net is model)   # DDP's gradients are views of its buckets: keep them
        step += 1

    torch.backends.cuda.enable_flash_sdp(True)
    for s, handler in handlers.items():
        signal.signal(s, handler)
    if rank > 0:
        return
    if stopping:
        here = os.environ.get("LOCAL_WORLD_SIZE")   # of several machines only they know how they met: ...
        launcher = f"torchrun --nproc_per_node={here}{'' if here == str(world) else ' ...'}" if store else "python"
        resume = " --init_from=resume" if (out / "ckpt.pt").exists() else ""   # before the first step there is nothing to resume
        print(f"{stop[0] if stop else 'a signal'}: stopped at step {step:,}; go on with\n  {launcher} train.py {shlex.join(argv)}{resume}")
        return
    curve = [float(r["val_loss"]) for r in log.rows if r["val_loss"]]
    print(f"\nvalidation loss {curve[0]:.2f} {launch.sparkline(curve)} {curve[-1]:.4f}, the best {best_val_loss:.4f}, in {clock(log.elapsed())}\n")
    tokenizer = Tokenizer(meta["tokenizer"])
    best = GPT.from_pretrained(weights.of_run(out)).to(device)   # whole, also where training had cut it
    tokens = best.generate(torch.tensor([[tokenizer.start]], device=device), 256, top_k=200, vocab_size=tokenizer.vocab_size)
    print(f"{tokenizer.decode(tokens[0, 1:].tolist())}\n\nmore of it: python sample.py --out_dir={c.out_dir}")


def main(argv):
    c, gpt_config, given = launch.settings(argv, __doc__, TrainConfig, GPTConfig)
    if c.fsdp and "RANK" not in os.environ:
        raise InputError(f"--fsdp cuts the model over several processes, which torchrun starts: torchrun "
                         f"--nproc_per_node={max(2, torch.cuda.device_count())} train.py {shlex.join(argv)}")
    store, rank, world = launch.join()
    if store is None:
        return train(c, gpt_config, given, argv, store, rank, world)
    status = 1
    try:
        train(c, gpt_config, given, argv, store, rank, world)
        launch.wait_for_all(store, "end")   # who leaves earlier cuts connections that others still read from (an all-reduce, too, may)
        status = 0
    except BaseException as e:
        launch.first_to_fail(store, e)
    finally:
        sys.stdout.flush()
        os._exit(status)   # at once: taking gloo or a broken NCCL down may hang or abort (torch 2.13)


if __name__ == "__main__":
    launch.run(main)
