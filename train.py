"""
Train a GPT: one loop for one process, replicas of the model (DDP) and a sharded model (FSDP).

  python train.py config/shakespeare.py                        from scratch
  python train.py config/shakespeare.py --init_from=resume     continue from the last checkpoint
  python train.py config/shakespeare.py --init_from=resume --eval_only    its validation loss
  python train.py config/shakespeare.py --learning_rate=1e-3   flags win over files
  python train.py config/finetune_shakespeare.py               start from the released GPT-2
  python train.py --help                                       every setting and its default

  torchrun --standalone --nproc_per_node=8 train.py                            GPT-2 124M, DDP
  torchrun --standalone --nproc_per_node=8 train.py config/gpt2_xl.py --fsdp   GPT-2 1558M, FSDP

  N processes  each one holds          computes           and they exchange
  one          everything              the whole batch    nothing
  DDP          everything, a replica   1/N of the batch   once per step gradients, averaged
                                                          (all-reduce)
  FSDP         1/N of every tensor,    1/N of the batch   for every micro-batch parameters, block
               and whole gradients                        by block (all-gather); once per step
               while they accumulate                      gradients, averaged (reduce-scatter)

On several machines FSDP shards inside each machine: N is then the processes of one machine, and
between machines gradients are averaged.

Settings are the fields of TrainConfig and model.GPTConfig; a config file is plain Python that sets
some of them.
"""

if __name__ == "__main__":
    import plumbing.ctrl_c  # noqa: F401, before the imports that take seconds

import functools
import math
import shlex
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recompute

from model import GPT, GPTConfig, require
from plumbing import reporting
from plumbing.checkpoints import load_checkpoint, restore, save_again, save_checkpoint
from plumbing.device import (
    choose_attention_kernels,
    choose_device,
    compiler_problem,
    disable_cudnn_attention,
    keep_freed_memory,
    padded,
    to_device,
)
from plumbing.errors import InputError, as_input_error, run_script
from plumbing.muon import Muon
from plumbing.processes import (
    AnyRank,
    all_reduce,
    decide_on_rank0,
    joined,
    make_copies_equal,
    mesh_of_processes,
    rank0_first,
)
from plumbing.progress import Stopwatch
from plumbing.run_folder import Metrics, checkpoint_of_run, checkpoint_to_resume, writing_to
from plumbing.settings import read_settings
from plumbing.signals import StopSignals
from plumbing.token_files import Data, check_tokenizer, load_meta
from plumbing.tokenizer import Tokenizer
from prepare_data import SUBSTITUTE_NOTE, find_dataset, prepare_if_missing


@dataclass
class TrainConfig:
    """Everything but the shape of the model. The defaults train GPT-2 124M on FineWeb."""
    out_dir: str = "out"                # folder for ckpt.pt, best.pt and metrics.csv
    dataset: str = "fineweb"            # folder in data/; see prepare_data.py
    init_from: str = "scratch"          # scratch, resume, auto, or weights: gpt2, a path, a Hub id
    batch_size: int = 512               # sequences per optimizer step, over all processes
    micro_batch_size: int = 16          # sequences per process at once; gradients accumulate
    max_iters: int = 19073              # optimizer steps
    learning_rate: float = 6e-4         # maximum, reached after warm-up
    min_lr: float | None = None         # minimum, at lr_decay_iters; None: learning_rate / 10
    warmup_iters: int = 700             # steps of linear warm-up
    lr_decay_iters: int | None = None   # step at which the cosine ends; None: max_iters
    optimizer: str = "adamw"            # adamw, or muon (plumbing/muon.py) for matrices in blocks
    weight_decay: float = 0.1           # of matrices and embeddings only
    beta1: float = 0.9                  # decay of the mean gradient (AdamW), momentum (Muon)
    beta2: float = 0.95                 # decay of the mean squared gradient (AdamW)
    grad_clip: float = 1.0              # maximum norm of the whole gradient; 0 = no clipping
    eval_interval: int = 250            # steps between evaluations; a checkpoint follows each
    eval_iters: int = 20                # batches per evaluation; at most the whole validation split
    eval_only: bool = False             # evaluate once and stop
    log_interval: int = 10              # steps between printed lines
    checkpoint_interval: int = 1000     # steps between checkpoints, besides those of evaluations
    checkpoint_minutes: float = 30.0    # maximum minutes between checkpoints
    fsdp: bool = False                  # under torchrun: shard the model instead of replicating it
    reshard_after_forward: bool = True  # FSDP: False sends less, but keeps gathered parameters
    checkpoint_activations: bool = False   # recompute a block in the backward pass: saves memory
    device: str = "auto"                # auto, cuda, cuda:1, mps, cpu
    dtype: str = "auto"                 # bfloat16 (matrix products), float32, auto = faster
    compile: bool | None = None         # torch.compile; None: on CUDA only
    seed: int = 1337                    # of weights, data order and dropout

    def __post_init__(self):
        at_least = dict.fromkeys(("batch_size", "micro_batch_size", "eval_interval", "eval_iters",
                                  "log_interval", "checkpoint_interval"), 1)
        at_least |= dict.fromkeys(("max_iters", "warmup_iters", "learning_rate", "weight_decay",
                                   "grad_clip", "checkpoint_minutes", "seed"), 0)
        for name, low in at_least.items():
            value = getattr(self, name)
            require(low <= value < 2**32, f"{name}={value} must be at least {low} and below 2**32")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name}={value} must be at least 0 and less than 1")
        if self.min_lr is not None:
            in_range = 0 <= self.min_lr <= self.learning_rate
            require(in_range, f"min_lr={self.min_lr} must be at least 0 and at most "
                              f"learning_rate={self.learning_rate}")
        require(self.out_dir and self.dataset, "out_dir and dataset must not be empty")
        choices = {"dtype": ("auto", "float32", "bfloat16"), "optimizer": ("adamw", "muon")}
        for name, allowed in choices.items():
            value = getattr(self, name)
            require(value in allowed, f"{name}={value!r} must be {' or '.join(allowed)}")


def load_config(argv):
    """For other programs: config files and flags -> TrainConfig, GPTConfig"""
    return tuple(read_settings(argv, __doc__, TrainConfig, GPTConfig)[0])


@dataclass
class Place:
    """Where this process computes, and its share of every batch."""
    device: torch.device
    bf16: bool           # matrix products in bfloat16
    rank: int            # of this process
    world: int           # number of processes
    micro: int           # sequences at once
    mode: str = "one"    # "one", "ddp" or "fsdp"

    @property
    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()


def find_place(c, group):
    """
    Choose device, dtype and mode for this process. group: all processes of the run, see
    plumbing/processes.py. Raises InputError if they cannot share the batch evenly.
    """
    device, bf16, line = choose_device(c.device, c.dtype)
    print(line)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")   # TF32 for products that stay in float32
    elif device.type == "cpu":
        keep_freed_memory()
    micro = max(1, min(c.micro_batch_size, c.batch_size // group.world))
    if c.batch_size % (micro * group.world) != 0:
        raise InputError(
            f"batch_size={c.batch_size} is not divisible among {group.world} process(es) with "
            f"{micro} sequences each at once: change batch_size, micro_batch_size="
            f"{c.micro_batch_size} or the number of processes")
    mode = "one"
    if group.under_torchrun:
        mode = "fsdp" if c.fsdp else "ddp"
    return Place(device, bf16, group.rank, group.world, micro, mode)


# ----------------------------------------------------------------------------------------------
# The model: from scratch, from weights, or of the run that is to be resumed

def build_model(start, checkpoint, asked, given, meta):
    """
    The model to train. Raises InputError for what does not fit together.

    start       where the weights come from: "scratch" ("auto" with nothing to resume means the
                same), or what GPT.from_pretrained takes
    checkpoint  the content of that file if this run resumes it, otherwise None
    asked       the GPTConfig that results from config files and flags
    given       {name: "file" or "flag"} of the settings that were set explicitly. Trained weights
                keep their own value of a field that is not among them; dropout is always as asked
    meta        meta.json of the dataset
    """
    changes = {name: value for name, value in asdict(asked).items() if name in given}
    if checkpoint:
        check_shape(checkpoint["gpt_config"], changes, start)
        changes = {}   # a resumed run keeps its own shape
    from_scratch = start in ("scratch", "auto")
    if from_scratch:
        vocab_size = changes.get("vocab_size", padded(meta["vocab_size"]))
        model = GPT(replace(asked, vocab_size=vocab_size))
    else:
        with as_input_error():
            model = GPT.from_pretrained(start, **(changes | {"dropout": asked.dropout}))
    if model.config.vocab_size < meta["vocab_size"]:
        raise InputError(f"vocab_size={model.config.vocab_size} is less than the "
                         f"{meta['vocab_size']} ids of the dataset")
    if not from_scratch:
        check_tokenizer(model.tokenizer_spec, model.config.vocab_size, meta, start)
    return model.train()


def check_shape(have, want, path):
    """A run that is resumed keeps its shape: InputError if another one was given."""
    for name, value in want.items():
        if name != "dropout" and have.get(name, value) != value:
            raise InputError(f"{path} has another architecture: {name} is {have[name]} there, "
                             f"not {value}")


# ----------------------------------------------------------------------------------------------
# One process, DDP or FSDP

def wrap(model, c, place):
    """Prepare the model for its mode. Returns the module that the loop calls."""
    if c.checkpoint_activations:
        for block in model.h:
            block.forward = functools.partial(recompute, block.forward, use_reentrant=False)
    if c.compile or (c.compile is None and place.device.type == "cuda"):
        compile_model(model, c, place)
    if place.mode == "fsdp":
        return shard(model, c, place)
    model.to(place.device)
    if place.mode == "ddp":
        return replicate(model, c, place)
    return model


def compile_model(model, c, place):
    problem = compiler_problem(place.device)
    failed = all_reduce(problem is not None, dist.ReduceOp.MAX)   # all compile, or none
    if failed:
        print(f"torch.compile failed, continuing without it: {problem or 'on another process'}")
        return
    print("torch.compile: the first steps take up to a few minutes")
    # With FSDP the blocks share one forward, which is compiled again for each different window. By
    # default torch.compile gives up after 8 times.
    torch._dynamo.config.recompile_limit = 8 + 2 * len(model.h)
    # FSDP gathers parameters between the blocks, so each block must be compiled by itself.
    parts = model.h if place.mode == "fsdp" else [model]
    for part in parts:
        part.forward = torch.compile(part.forward)


def shard(model, c, place):
    """
    FSDP2 changes the model in place: parameters become DTensors, of which each process holds a part
    (full_tensor() gathers it), and the model gains reshard() and set_requires_gradient_sync().
    """
    # Imported here, because it takes half a second.
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = mesh_of_processes(place.device.type)
    policy = MixedPrecisionPolicy()
    if place.bf16:   # blocks then also pass bfloat16 to each other; with DDP they pass float32
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    # This also moves a block to the device, and keeps its shard: no device has to hold all blocks.
    for block in model.h:
        fully_shard(block, mesh=mesh, mp_policy=policy,
                    reshard_after_forward=c.reshard_after_forward)
    # What is left: embeddings, last norm and head. Tied ones must be in one group.
    fully_shard(model, mesh=mesh, mp_policy=policy)
    make_copies_equal(model, mesh)
    return model


def replicate(model, c, place):
    """
    A module that the loop calls instead of the model, which is on its device: in the backward pass
    it averages the gradients over all processes, unless set_gradient_sync has switched that off.
    """
    net = DistributedDataParallel(model, gradient_as_bucket_view=True)
    if not c.eval_only:
        # After its first backward pass DDP regroups gradients into other buckets, which changes the
        # rounding. Do that pass now, on zeros, so that a resumed run equals an uninterrupted one.
        idx = torch.zeros(place.micro, model.config.block_size, dtype=torch.int64,
                          device=place.device)
        with place.autocast:
            loss = net(idx, idx, loss_only=True)[1]
        loss.backward()
        net.zero_grad(set_to_none=False)
    return net


def set_gradient_sync(net, place, sync):
    """
    Whether the next backward pass exchanges gradients; set it before the forward pass. Without an
    exchange, FSDP keeps whole gradients.
    """
    if place.mode == "ddp":
        net.require_backward_grad_sync = sync
    elif place.mode == "fsdp":
        net.set_requires_gradient_sync(sync)


# ----------------------------------------------------------------------------------------------
# One step

def make_optimizers(model, c, device):
    """AdamW, or Muon for the matrices inside the blocks and AdamW for all other parameters."""
    inner = []
    if c.optimizer == "muon":
        inner = [p for p in model.h.parameters() if p.dim() == 2]
    in_blocks = set(inner)
    rest = [p for p in model.parameters() if p not in in_blocks]
    # Weight decay is for matrices and embeddings, not for biases and layer norms.
    groups = [{"params": [p for p in rest if p.dim() == 2], "weight_decay": c.weight_decay},
              {"params": [p for p in rest if p.dim() == 1], "weight_decay": 0.0}]
    fused = device.type != "mps"
    optimizers = [torch.optim.AdamW(groups, c.learning_rate, (c.beta1, c.beta2), fused=fused)]
    if inner:
        # Its updates are as large as AdamW's, so that one learning rate serves both.
        optimizers.append(Muon(inner, c.learning_rate, c.weight_decay, momentum=c.beta1))
    return optimizers


def lr_at(step, c):
    """Linear warm-up, then half a cosine from learning_rate to min_lr, then min_lr."""
    end = c.max_iters if c.lr_decay_iters is None else c.lr_decay_iters
    min_lr = c.learning_rate / 10 if c.min_lr is None else c.min_lr
    if step < c.warmup_iters:
        return c.learning_rate * (step + 1) / (c.warmup_iters + 1)
    if step >= end:
        return min_lr
    progress = (step - c.warmup_iters) / (end - c.warmup_iters)
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (c.learning_rate - min_lr)


def accumulate_gradients(step, net, data, c, place):
    """
    Add up the gradient of this process's share of the batch, place.micro sequences at a time. In
    the end DDP and FSDP average it over all processes. Returns the mean loss of the share.
    """
    share = c.batch_size // place.world
    # Sequences are numbered through the whole run; data.batch() shuffles them anew every epoch.
    begin = step * c.batch_size + place.rank * share
    total = torch.zeros((), device=place.device)
    for first in range(begin, begin + share, place.micro):
        is_last = first + place.micro == begin + share
        set_gradient_sync(net, place, sync=is_last)
        x, y = to_device(data.batch(range(first, first + place.micro)), place.device)
        with place.autocast:
            loss = net(x, y, loss_only=True)[1] * (place.micro / share)
        loss.backward()
        total += loss.detach()
    return total


def train_step(step, net, optimizers, data, c, place):
    """One optimizer step. Returns the mean loss here and the gradient's norm before clipping."""
    # Dropout depends on seed, step, rank and world alone, so a resumed run needs no random state.
    # Neighbouring seeds lie a million steps apart.
    torch.manual_seed((c.seed * 1_000_003 + step) * place.world + place.rank)
    lr = lr_at(step, c)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
    loss = accumulate_gradients(step, net, data, c, place)
    max_norm = c.grad_clip or math.inf   # inf: measure only
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), max_norm)
    if place.mode == "fsdp":
        norm = norm.full_tensor()
    for optimizer in optimizers:
        optimizer.step()
    net.zero_grad(set_to_none=place.mode != "ddp")   # DDP's gradients are views of its buffers
    return loss, norm


@torch.no_grad()
def evaluate(net, data, c, place):
    """
    Mean loss in nats per token over the first eval_iters * batch_size sequences of the validation
    split, the same ones each time. Every process takes part and gets the result.
    """
    net.eval()
    n = min(data.n, c.eval_iters * c.batch_size)
    total = 0.0
    # All processes make the same number of calls, of the same shape: FSDP gathers parameters from
    # all of them, and torch.compile would compile again. So the end is filled with repeats of the
    # last sequence, whose targets are ignored.
    for first in range(0, n, place.micro * place.world):
        begin = first + place.rank * place.micro
        indices = range(begin, begin + place.micro)
        counted = sum(i < n for i in indices)
        x, y = data.sequences([min(i, n - 1) for i in indices])
        y[counted:] = -1
        x, y = to_device((x, y), place.device)
        with place.autocast:
            loss = net(x, y, loss_only=True)[1]
        if counted:
            total += loss.item() * counted
    if place.mode == "fsdp":
        # The backward pass would free what FSDP still holds gathered, but there is none here.
        for part in (*net.h, net):
            part.reshard()
    net.train()
    return all_reduce(total) / n


# ----------------------------------------------------------------------------------------------
# The run

@dataclass
class Run:
    """What set_up makes and the loop uses."""
    c: TrainConfig
    place: Place
    model: GPT
    net: torch.nn.Module     # what the loop calls: the model, or DDP around it
    optimizers: list
    train_data: Data
    val_data: Data
    meta: dict               # meta.json of the dataset
    metrics: Metrics | None = None     # of rank 0
    step: int = 0                      # optimizer steps done
    best_val_loss: float = math.inf
    loss: torch.Tensor | float = 0.0   # of the last step: mean over this process's share
    norm: torch.Tensor | float = 0.0   # of the last step: of the whole gradient

    def save(self, names):
        """Write the state once, under the first name; the other becomes a second name of it."""
        first, *others = [Path(self.c.out_dir) / name for name in names]
        save_checkpoint(first, self.model, self.optimizers, self.c, self.step, self.best_val_loss,
                        self.meta)
        for other in others:
            save_again(first, other)


def set_up(c, gpt_config, given, group):
    """Everything before the first step of a new or resumed run"""
    path, checkpoint = find_checkpoint(c)
    earlier = checkpoint["train_config"] if checkpoint else {}   # settings of the run so far
    if c.dtype == "auto":
        c = replace(c, dtype=earlier.get("dtype", "auto"))   # on resume, not measured again
    place = find_place(c, group)
    c = replace(c, dtype="bfloat16" if place.bf16 else "float32")

    reporting.warn_of_slow_evaluation(c, gpt_config, place)
    # Rank 0 prepares the data, downloads included: as much of a large dataset as this run needs.
    # Without a network, Python's own library takes Shakespeare's place, unless a flag named it.
    tokens = c.max_iters * c.batch_size * gpt_config.block_size
    may_substitute = given.get("dataset") != "flag"
    dataset = decide_on_rank0(
        group, lambda: find_dataset(c.dataset, tokens, may_substitute, earlier.get("dataset")))
    c = replace(c, dataset=dataset)

    def load():
        prepare_if_missing(dataset, tokens)   # other machines may not see rank 0's disk
        meta = load_meta(Path("data") / dataset)
        torch.manual_seed(c.seed)
        return meta, build_model(path or c.init_from, checkpoint, gpt_config, given, meta)

    meta, model = rank0_first(group, load)   # one process downloads what the others then find
    run = make_run(c, place, meta, model)
    if checkpoint:
        restore(run, checkpoint, path)   # the optimizers' state, the step, the best loss
        reporting.log_resume(run, path, earlier)
    return run


def find_checkpoint(c):
    """The path and the content of the checkpoint that this run is to resume, or None, None"""
    path = checkpoint_to_resume(c.out_dir, c.init_from)
    checkpoint = load_checkpoint(path) if path else None
    step = checkpoint["step"] if checkpoint else -1
    if all_reduce(step, dist.ReduceOp.MAX) != all_reduce(step, dist.ReduceOp.MIN):
        raise InputError(f"{c.out_dir} is not at the same step on all machines: it must be one "
                         f"folder that they share")
    return path, checkpoint


def make_run(c, place, meta, model):
    block_size = model.config.block_size
    train_data, val_data = [Data(Path("data") / c.dataset, meta, split, block_size, c.seed)
                            for split in ("train", "val")]
    choose_attention_kernels(place.device, place.bf16, model.config)
    net = wrap(model, c, place)
    optimizers = make_optimizers(model, c, place.device)   # after wrap: FSDP replaces parameters
    return Run(c, place, model, net, optimizers, train_data, val_data, meta)


def may_evaluate(step, c):
    return step >= c.max_iters or step % c.eval_interval == 0


def what_is_due(step, c, stop, overdue):
    """-> evaluate_now, save, log"""
    at_end = step >= c.max_iters
    evaluate_now = not stop and may_evaluate(step, c)
    save = stop or overdue or evaluate_now or step % c.checkpoint_interval == 0
    log = stop or at_end or step % c.log_interval == 0
    return evaluate_now, save, log


def loop(run, under_torchrun):
    """Train until max_iters or a signal. Returns the name of the signal, or None."""
    c = run.c
    first_step = logged_step = run.step
    stopwatch = Stopwatch()
    save_by = time.monotonic() + 60 * c.checkpoint_minutes
    # Signals and clocks differ between processes, so all decide together: if one saved while
    # another trained on, both would wait forever.
    any_rank = AnyRank()
    with StopSignals(under_torchrun) as signals:

        def flags():
            return signals.received() is not None, time.monotonic() > save_by

        while True:   # a new run begins with an evaluation at step 0
            # The answer may be a step old, but not before an evaluation, which may take minutes.
            stop, overdue = any_rank.read(*flags(), now=may_evaluate(run.step, c))
            evaluate_now, save, log = what_is_due(run.step, c, stop, overdue)
            if log or save:
                loss = checked_loss(run)   # before the pause: it waits for the GPU's last steps
                stopwatch.pause()
                if log and run.step > logged_step:
                    steps_per_second = (run.step - logged_step) / stopwatch.lap()
                    seconds_per_step = stopwatch.elapsed() / (run.step - first_step)
                    reporting.log_step(run, loss, steps_per_second, seconds_per_step)
                    logged_step = run.step
                names = []
                if evaluate_now and evaluate_and_compare(run):
                    names.append("best.pt")
                if save and run.step > first_step:
                    names.append("ckpt.pt")
                if names:
                    run.save(names)
                    save_by = time.monotonic() + 60 * c.checkpoint_minutes
                if stop:
                    return signals.received() or "a signal"   # which another process received
                if run.step >= c.max_iters:
                    return None
                stopwatch.resume()
            any_rank.send(*flags())
            run.loss, run.norm = train_step(run.step, run.net, run.optimizers, run.train_data, c,
                                            run.place)
            run.step += 1


def checked_loss(run):
    """The mean loss of the last step, over all processes. It and the norm must be finite."""
    loss = all_reduce(float(run.loss)) / run.place.world
    reporting.check_finite(run.step, "loss", loss)
    reporting.check_finite(run.step, "gradient norm", float(run.norm))
    return loss


def evaluate_and_compare(run):
    """Evaluate -> whether the loss is the lowest so far"""
    val_loss = evaluate(run.net, run.val_data, run.c, run.place)
    reporting.check_finite(run.step, "validation loss", val_loss)
    reporting.log_eval(run, val_loss)
    is_best = val_loss < run.best_val_loss
    run.best_val_loss = min(val_loss, run.best_val_loss)
    return is_best


def train(asked, gpt_config, given, argv, group):
    """asked: a TrainConfig. run.c is the same with dtype decided and the dataset that was found."""
    run = set_up(asked, gpt_config, given, group)
    reporting.log_start(run)
    if run.c.eval_only:
        print(f"validation loss {evaluate(run.net, run.val_data, run.c, run.place):.4f}")
        return
    with writing_to(Path(run.c.out_dir), run.step, group.rank) as run.metrics:
        stopped_by = loop(run, group.under_torchrun)
    if stopped_by:
        reporting.log_stop(run, stopped_by, argv)
    elif group.rank == 0:
        reporting.log_end(run)
        show_sample(run)
    if run.c.dataset != asked.dataset:
        print(SUBSTITUTE_NOTE)


def show_sample(run):
    """A first text from the best checkpoint, which is whole even if the model is sharded"""
    disable_cudnn_attention()
    tokenizer = Tokenizer(run.meta["tokenizer"])
    model = GPT.from_pretrained(checkpoint_of_run(run.c.out_dir)).to(run.place.device)
    start = torch.tensor([[tokenizer.start]], device=run.place.device)
    tokens = model.generate(start, 256, top_k=200, vocab_size=tokenizer.vocab_size)
    print(tokenizer.decode(tokens[0, 1:].tolist()))
    print(f"\nmore of it: python sample.py --out_dir={run.c.out_dir}")


def main(argv):
    with joined() as group:
        (c, gpt_config), given = read_settings(argv, __doc__, TrainConfig, GPTConfig)
        if c.fsdp and not group.under_torchrun:
            n = max(2, torch.cuda.device_count())
            raise InputError(
                f"--fsdp shards the model across several processes, which torchrun starts: "
                f"torchrun --standalone --nproc_per_node={n} train.py {shlex.join(argv)}")
        # A config file is Python and may decide by the machine it runs on: all use rank 0's values.
        c, gpt_config, given = decide_on_rank0(
            group, lambda: (asdict(c), asdict(gpt_config), given))   # plain values, sent as JSON
        train(TrainConfig(**c), GPTConfig(**gpt_config), given, argv, group)


if __name__ == "__main__":
    run_script(main, needs_reader=False)
