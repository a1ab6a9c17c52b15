"""
Train a GPT. Every setting is a field of TrainConfig or of model.GPTConfig; a config file is plain Python that sets some.

  python train.py config/shakespeare.py                        from scratch, in about a minute on a laptop
  python train.py config/shakespeare.py --init_from=resume     go on from the last checkpoint in out_dir
  python train.py config/shakespeare.py --init_from=resume --eval_only    the validation loss of that checkpoint
  python train.py config/shakespeare.py --learning_rate=1e-3   a flag wins over a file, a later file over an earlier one
  python train.py config/finetune_shakespeare.py               start from the released GPT-2
  python train.py --help                                       every setting, its default and its meaning
"""

import ast
import csv
import difflib
import inspect
import itertools
import math
import os
import re
import shlex
import signal
import sys
import time
import traceback
import types
import typing
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from torch.nn import functional as F

import weights
from model import GPT, GPTConfig, InputError
from prepare_data import FINEWEB_SHARDS, SHARD_TOKENS, Data, Tokenizer, load_meta, prepare, run


# ----------------------------------------------------------------------------------------------------------------------
# Configuration. The defaults train GPT-2 124M on 10 billion tokens of FineWeb.

@dataclass
class TrainConfig:
    """Everything but the shape of the model."""
    out_dir: str = "out"                # ckpt.pt, best.pt and metrics.csv go here
    dataset: str = "fineweb"            # folder in data/; prepared if missing, where prepare_data.py knows the name
    init_from: str = "scratch"          # scratch, resume, auto (resume if out_dir has a ckpt.pt), gpt2[-medium|-large|-xl], or a folder
    batch_size: int = 512               # sequences in one optimizer step
    micro_batch_size: int = 16          # sequences in memory at once; gradients accumulate until the batch is full
    max_iters: int = 19073              # optimizer steps
    learning_rate: float = 6e-4         # the highest: reached after warm-up
    min_lr: float | None = None         # the lowest: reached at lr_decay_iters; None = learning_rate / 10
    warmup_iters: int = 700             # steps of linear warm-up
    lr_decay_iters: int | None = None   # step at which the cosine ends; None = max_iters
    weight_decay: float = 0.1           # AdamW, on matrices only
    beta1: float = 0.9                  # AdamW: how slowly the mean of the gradients forgets
    beta2: float = 0.95                 # AdamW: how slowly the mean of their squares forgets
    grad_clip: float = 1.0              # longest gradient, as a norm over all parameters; 0 = no limit
    eval_interval: int = 250            # steps between evaluations, each followed by a checkpoint
    eval_iters: int = 20                # validation batches (of batch_size) in an evaluation; the whole split if it has fewer
    eval_only: bool = False             # evaluate once and stop
    log_interval: int = 10              # steps between lines
    checkpoint_interval: int = 1000     # steps between checkpoints besides those of evaluations
    device: str = "auto"                # auto, cuda, cuda:1, mps, cpu
    dtype: str = "auto"                 # bfloat16 (matrix products only, weights stay float32) or float32; auto = what is fast here
    compile: bool | None = None         # torch.compile; None = where it pays: on CUDA
    seed: int = 1337                    # of the weights, the order of the data, and dropout

    def __post_init__(self):
        for name in ("batch_size", "micro_batch_size", "eval_interval", "eval_iters", "log_interval", "checkpoint_interval"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("max_iters", "warmup_iters", "learning_rate", "weight_decay", "grad_clip", "seed"):
            if not 0 <= getattr(self, name) < 2**32:
                raise InputError(f"{name}={getattr(self, name)}: must be at least 0 and less than 2**32")
        if not self.out_dir or not self.dataset:
            raise InputError(f"out_dir={self.out_dir!r}, dataset={self.dataset!r}: neither may be empty")
        if self.min_lr is not None and not 0 <= self.min_lr <= self.learning_rate:
            raise InputError(f"min_lr={self.min_lr}: must be at least 0 and at most learning_rate={self.learning_rate}")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise InputError(f"beta1={self.beta1}, beta2={self.beta2}: both must be at least 0 and less than 1")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise InputError(f"dtype={self.dtype!r}: must be auto, float32 or bfloat16")
        self.micro_batch_size = min(self.micro_batch_size, self.batch_size)
        if self.batch_size % self.micro_batch_size:
            raise InputError(f"batch_size={self.batch_size} is not a multiple of micro_batch_size={self.micro_batch_size}: change one")


def load_config(argv):
    """
    argv: config files, and --key=value, --key value or --flag, in any order; flags win over files, later over earlier
    returns TrainConfig, GPTConfig; raises ValueError for an unknown name, a wrong type or a file that cannot be run
    """
    kinds = {f.name: f.type for cls in (TrainConfig, GPTConfig) for f in fields(cls)}
    from_files, from_flags, args = {}, {}, list(argv)
    while args:
        arg = args.pop(0)
        if arg in ("-h", "--help"):
            print_help()
            sys.exit(0)
        if not arg.startswith("-"):
            for key, value in run_config_file(arg).items():
                from_files[key] = check(key, value, kinds, f"{arg}: ")
            continue
        key, equals, text = arg.lstrip("-").partition("=")   # at the first "=": the value may hold more of them
        if not equals:
            flag = key not in kinds or bool in allowed_types(kinds[key])
            follows = bool(args) and not args[0].startswith("--") and (not flag or args[0].lower() in ("true", "false", "none"))
            if not flag and not follows:
                raise InputError(f"--{key} needs a value")
            text = args.pop(0) if follows else "True"
        from_flags[key] = check(key, text if str in allowed_types(kinds.get(key)) else parse(text), kinds, "--")
    values = from_files | from_flags
    return tuple(cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values}) for cls in (TrainConfig, GPTConfig))


def run_config_file(path):
    """Run a config file in a namespace of its own -> the plain values it sets."""
    try:
        source = Path(path).read_text(encoding="utf-8-sig")   # Windows may have put a mark in front
    except (OSError, UnicodeDecodeError) as e:
        there = ", ".join(sorted(p.as_posix() for p in Path("config").glob("*.py"))) or "none: run it in the folder of train.py"
        raise InputError(f"cannot read the config file {path}: {getattr(e, 'strerror', None) or 'not UTF-8 text'}; there are {there}") from None
    namespace = {"__file__": path}
    try:
        exec(compile(source, path, "exec"), namespace)
    except (Exception, SystemExit) as e:
        frames = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == path]
        line = frames[-1] if frames else getattr(e, "lineno", None)   # a SyntaxError has no frame of its own
        raise InputError(f"{path}{f', line {line}' if line else ''}: {type(e).__name__}: {(str(e).splitlines() or [''])[0]}") from None
    return {k: v for k, v in namespace.items() if not (k.startswith("_") or isinstance(v, types.ModuleType) or callable(v))}


def parse(text):
    """The Python value that text spells, in any case for True, False and None; else the text itself."""
    try:
        return ast.literal_eval(text.capitalize() if text.lower() in ("true", "false", "none") else text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return text


def allowed_types(kind):
    """int | tuple[int, ...] | None -> (int, tuple, NoneType)"""
    return tuple(typing.get_origin(t) or t for t in typing.get_args(kind) or (kind,))


def check(key, value, kinds, where):
    """value, if key is a setting and value of its type; an int is a fine float."""
    if key not in kinds:
        near = difflib.get_close_matches(key, kinds, 1)
        raise InputError(f"{where}{key} is not a setting{f', did you mean {near[0]}?' if near else ''} "
                         f"(--help lists them all; a name of your own begins with _)")
    allowed = allowed_types(kinds[key])
    if float in allowed and type(value) is int:
        value = float(value)
    if tuple in allowed and type(value) is list:
        value = tuple(value)
    if type(value) not in allowed:
        wanted = " or ".join("None" if t is types.NoneType else t.__name__ for t in allowed)
        raise InputError(f"{where}{key}={value!r} is of type {type(value).__name__}, must be {wanted}")
    return value


def print_help():
    print(__doc__)
    for cls in (TrainConfig, GPTConfig):
        print(f"{cls.__name__}: {cls.__doc__}")
        for f in fields(cls):
            comment = re.search(rf"^    {f.name}:.*?  # (.*)$", inspect.getsource(cls), re.MULTILINE)
            print(f"  --{f.name}={f.default}".ljust(36), comment[1] if comment else "")
        print()


# ----------------------------------------------------------------------------------------------------------------------
# The pieces of the loop

# bf16 matrix products a second by data sheet, dense. A device that is not listed gets no MFU rather than a wrong one.
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12,
              "RTX 4090": 165e12, "RTX 3090": 71e12, "L4": 121e12}


def choose_device(device, dtype):
    """-> torch.device, bf16 or not, a line that says which and why"""
    asked = device
    if asked != "auto":
        why = "as asked"
    elif torch.cuda.is_available():
        device, why = "cuda", torch.cuda.get_device_name()
    elif torch.backends.mps.is_available():
        device, why = "mps", "Apple GPU"
    else:
        device, why = "cpu", f"no CUDA or Apple GPU found; {torch.get_num_threads()} threads"
    try:
        device = torch.device(device)
        if device.type not in ("cuda", "mps", "cpu"):
            raise RuntimeError("must be auto, cuda, cuda:1, mps or cpu")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"device={asked}: {str(e).splitlines()[0]}; --device=auto takes what is there") from None
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:   # macOS: float32, which works on every version
        has_bf16 = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    bf16 = dtype == "bfloat16" or dtype == "auto" and has_bf16
    why_dtype = "as asked" if dtype != "auto" else f"the hardware has {'' if has_bf16 else 'no '}bfloat16"
    return device, bf16, f"device: {device} ({why}), {'bfloat16' if bf16 else 'float32'} ({why_dtype})"


def peak_flops(name):
    """The entry whose words all stand in the device's name ("NVIDIA H100 80GB HBM3"), or None."""
    words = set(name.replace("-", " ").split())
    return next((v for k, v in PEAK_FLOPS.items() if set(k.split()) <= words and "Laptop" not in words), None)


def lr_at(step, c):
    """Linear warm-up to learning_rate, half a cosine down to min_lr at lr_decay_iters, then min_lr."""
    end = c.max_iters if c.lr_decay_iters is None else c.lr_decay_iters
    lowest = c.learning_rate / 10 if c.min_lr is None else c.min_lr
    if step < c.warmup_iters:
        return c.learning_rate * (step + 1) / (c.warmup_iters + 1)
    if step >= end:
        return lowest
    progress = (step - c.warmup_iters) / (end - c.warmup_iters)
    return lowest + 0.5 * (1 + math.cos(math.pi * progress)) * (c.learning_rate - lowest)


def make_optimizer(model, c, device):
    """AdamW. Decay pulls matrices and embeddings towards zero; biases and layer norms have no reason to be small."""
    groups = [dict(params=[p for p in model.parameters() if p.dim() >= 2], weight_decay=c.weight_decay),
              dict(params=[p for p in model.parameters() if p.dim() < 2], weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=c.learning_rate, betas=(c.beta1, c.beta2), fused=device.type != "mps")


def compiled(model, autocast, x, y):
    """torch.compile(model), after one trial; model itself if the machine cannot (no compiler, say), and the reason."""
    print("compiling, which takes up to a few minutes")
    try:
        fast = torch.compile(model)
        with autocast:
            fast(x, y)[1].backward()
        return fast
    except Exception as e:
        print(f"torch.compile failed, going on without it: {type(e).__name__}: {str(e).strip().splitlines()[0]:.200}")
        return model
    finally:
        model.zero_grad()


@torch.no_grad()
def evaluate(model, forward, data, c, autocast, device):
    """Mean loss over the first eval_iters*batch_size windows, or all: the same ones each time, so losses compare."""
    model.eval()
    n, total = min(data.n, c.eval_iters * c.batch_size), 0.0
    for start in range(0, n, c.micro_batch_size):
        x, y = data.windows(range(start, min(start + c.micro_batch_size, n)))
        short = (0, 0, 0, c.micro_batch_size - len(x))   # fill up the last one: a new shape would compile anew
        with autocast:
            _, loss = forward(F.pad(x, short).to(device), F.pad(y, short, value=-1).to(device))
        total += loss.item() * len(x)
    model.train()
    return total / n


def save(path, model, optimizer, config, step, best_val_loss, tokenizer):
    """All that is needed to go on, to sample or to start from; the file changes whole or not at all."""
    names = {p: name for name, p in model.named_parameters()}
    checkpoint = dict(model=model.state_dict(), optimizer={names[p]: state for p, state in optimizer.state.items()},
                      gpt_config=asdict(model.config), train_config=asdict(config), step=step,
                      best_val_loss=best_val_loss, tokenizer=tokenizer,
                      rng=torch.get_rng_state())   # for the record: train.py seeds every step anew, so that nothing depends on it
    try:
        with weights.replacing(path) as f:
            torch.save(checkpoint, f)
    except (OSError, RuntimeError) as e:   # torch reports a full disk as either
        raise InputError(f"cannot save {path} ({str(e).splitlines()[0]}): what was there before is untouched; when that is put "
                         f"right, go on with --init_from=auto") from None


def load_optimizer(optimizer, model, states, path):
    """Put back the state of every parameter, saved by its name."""
    names = {p: name for name, p in model.named_parameters()}
    if states.keys() != set(names.values()):
        raise InputError(f"{path}: the optimizer's state is not of this model")
    order = [names[p] for group in optimizer.param_groups for p in group["params"]]
    state = {i: states[name] for i, name in enumerate(order)}   # torch numbers parameters in the order of its groups
    optimizer.load_state_dict(dict(state=state, param_groups=optimizer.state_dict()["param_groups"]))


def build_model(c, asked, meta):
    """-> a model as init_from says, and the checkpoint if it is to be resumed, else None. asked: the GPTConfig of the flags"""
    path, checkpoint = Path(c.out_dir) / "ckpt.pt", None
    if c.init_from == "scratch" or c.init_from == "auto" and not path.exists():
        if asked.vocab_size == GPTConfig.vocab_size:   # not asked for: what the tokenizer has
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
        weights.copy(model, checkpoint["model"], path)
        started = checkpoint["train_config"].get("init_from")
        wanted = {f.name: getattr(asked, f.name) for f in fields(asked) if getattr(asked, f.name) != f.default or
                  started == "scratch" and f.name != "vocab_size"}   # a run that began with other weights took their shape
        changed = [f"{k} was {v}, is {getattr(c, k)}" for k, v in checkpoint["train_config"].items()
                   if k not in ("init_from", "eval_only") and getattr(c, k, v) != v]
        c.init_from = started   # what the next checkpoints, too, should say
        print(f"resuming {path} at step {checkpoint['step']:,}{'; note: ' + ', '.join(changed) if changed else ''}")
    else:   # someone's weights: what is not asked for is as they are, dropout apart
        path = c.init_from
        wanted = {f.name: getattr(asked, f.name) for f in fields(asked) if f.name == "dropout" or getattr(asked, f.name) != f.default}
        fixed = ("vocab_size", "n_layer", "n_head", "n_embd", "bias", "tied")
        model = GPT.from_pretrained(path, **{k: v for k, v in wanted.items() if k not in fixed})
    if other := [f"{k} is {getattr(model.config, k)} there, not {v}" for k, v in wanted.items() if getattr(model.config, k) != v]:
        raise InputError(f"{path} has another architecture: {', '.join(other)}")
    if model.tokenizer not in (None, meta["tokenizer"]) or model.config.vocab_size < meta["vocab_size"]:
        raise InputError(f"{path} was trained with another tokenizer than data/{c.dataset} has: its ids mean other text; prepare yours "
                         f"with the same one (GPT-2's: --tokenizer gpt2)")
    return model, checkpoint


class Log:
    """metrics.csv: one row per printed line, fields left empty where a line does not have them."""
    FIELDS = ("step", "tokens", "train_loss", "val_loss", "lr", "grad_norm", "tokens_per_s", "elapsed_s")

    def __init__(self, path, resume_step=None):
        self.path, self.rows = path, []
        if resume_step is not None and path.exists():   # rows after the checkpoint will be written again
            text = path.read_text(encoding="utf-8", errors="replace").replace("\0", "")   # a crash may leave the last line in any state
            table = csv.DictReader(text.splitlines())
            if tuple(table.fieldnames or ()) != self.FIELDS:
                os.replace(path, f"{path}.unknown")
                print(f"{path} is not as train.py writes it: it is now {path}.unknown")
            whole = [r for r in table if None not in r.values() and r.get("step", "").isdigit()]
            self.rows = [r for r in whole if int(r["step"]) < resume_step or int(r["step"]) == resume_step and not r["val_loss"]]
        with weights.replacing(path) as f:
            f.write(("\n".join([",".join(self.FIELDS)] + [",".join(r[k] for k in self.FIELDS) for r in self.rows]) + "\n").encode())

    def __call__(self, **row):
        self.rows.append({k: str(row.get(k, "")) for k in self.FIELDS})
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(",".join(self.rows[-1].values()) + "\n")


def check_finite(step, name, value):
    if not math.isfinite(value):
        raise InputError(f"step {step}: {name} {value}. Nothing was overwritten, the last checkpoint is from before; a lower "
                         f"learning_rate, a longer warm-up or dtype=float32 may help")


def sparkline(values):
    """[3.0, 2.0, 1.5] -> "█▄▁" """
    low, high = min(values), max(values)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (v - low) / (high - low or 1))] for v in values)


def clock(seconds):
    hours, minutes = divmod(int(seconds) // 60, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{int(seconds) % 60:02d}s"


# ----------------------------------------------------------------------------------------------------------------------
# Training

def main(argv):
    c, gpt_config = load_config(argv)
    device, bf16, line = choose_device(c.device, c.dtype)
    print(line)
    autocast = torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")   # TF32 for what is still float32

    # data
    folder = Path("data") / c.dataset
    if not (folder / "meta.json").exists():
        tokens = c.max_iters * c.batch_size * gpt_config.block_size
        prepare(c.dataset, shards=min(FINEWEB_SHARDS, math.ceil(tokens / SHARD_TOKENS)) or 1)
    meta = load_meta(folder)

    # model
    torch.manual_seed(c.seed)
    model, checkpoint = build_model(c, gpt_config, meta)
    model.to(device).train()
    block_size = model.config.block_size
    train_data = Data(folder, meta, "train", block_size, c.seed)
    val_data = Data(folder, meta, "val", block_size, c.seed)
    switches = [name for name in ("rope", "gqa", "swa") if getattr(model.config, f"use_{name}")]
    print(f"model: {'+'.join(switches) or 'gpt2'}, {model.num_params() / 1e6:.2f}M parameters; "
          f"data: {folder}, {train_data.n * block_size:,} training tokens")

    # batch arithmetic
    micro = c.micro_batch_size
    tokens_per_step = c.batch_size * block_size
    print(f"batch: {c.batch_size} sequences = {c.batch_size // micro} accumulation step(s) x {micro} x 1 process; "
          f"{tokens_per_step:,} tokens a step, {c.max_iters:,} steps, {c.max_iters * c.batch_size / train_data.n:.2g} epochs")

    # optimizer, and where we are
    optimizer = make_optimizer(model, c, device)
    step, best_val_loss = 0, math.inf
    if checkpoint:
        load_optimizer(optimizer, model, checkpoint["optimizer"], c.out_dir)
        step, best_val_loss = checkpoint["step"], checkpoint["best_val_loss"]
        del checkpoint

    forward = model
    if c.compile or c.compile is None and device.type == "cuda":
        forward = compiled(model, autocast, *(t.to(device) for t in train_data.batch(range(micro))))
    if c.eval_only:
        print(f"validation loss {evaluate(model, forward, val_data, c, autocast, device):.4f}")
        return

    out = Path(c.out_dir)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"out_dir={c.out_dir}: {e.strerror}; name a folder that can be made and written to") from None
    if step == 0:
        there = [name for name in ("ckpt.pt", "best.pt", "metrics.csv") if (out / name).exists()]
        if there:   # a run that is already there is not lost to this one
            old = next(path for n in itertools.count(1) if not (path := out / f"old{n}").exists())
            old.mkdir()
            for name in there:
                os.replace(out / name, old / name)
            print(f"an earlier run was there: {', '.join(there)} are now in {old}")
    log = Log(out / "metrics.csv", resume_step=step or None)

    stop = []   # the first SIGINT or SIGTERM ends the run after the step it is in, a second one at once
    def on_signal(number, frame):
        stop.append(signal.Signals(number).name)
        os.write(2, b"finishing this step; once more stops at once\n")   # print is not safe here
        signal.signal(number, signal.SIG_DFL)
    handlers = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}

    def save_as(name):
        save(out / name, model, optimizer, c, step, best_val_loss, meta["tokenizer"])

    flops = model.flops_per_token(block_size)
    peak = peak_flops(torch.cuda.get_device_name()) if bf16 and device.type == "cuda" else None
    first_step, start, elapsed_before = step, time.perf_counter(), float(log.rows[-1]["elapsed_s"] or 0) if log.rows else 0.0
    train_seconds, counted_from, running_since = 0.0, step, start   # evaluations and checkpoints do not count
    lr, loss, norm = 0.0, torch.zeros(()), torch.zeros(())   # of the last step
    while True:
        stopping = bool(stop)   # looked at once: a signal may come at any moment, and what follows must agree
        evaluating = step % c.eval_interval == 0 or step >= c.max_iters
        saving = evaluating or stopping or step % c.checkpoint_interval == 0
        logging = stopping or step % c.log_interval == 0 or step >= c.max_iters
        if saving or logging:   # only here: reading a number waits until the GPU has computed it
            check_finite(step, "loss", loss.item())
            check_finite(step, "gradient norm", norm.item())
            train_seconds += time.perf_counter() - running_since
            if logging and step > counted_from:
                elapsed = time.perf_counter() - start
                speed = (step - counted_from) * tokens_per_step / train_seconds
                mfu = f" | MFU {speed * flops / peak:.1%}" if peak else ""
                left = clock(elapsed / (step - first_step) * (c.max_iters - step))
                print(f"step {step:,}/{c.max_iters:,} | loss {loss.item():.4f} | lr {lr:.2e} | norm {norm.item():.2f} | "
                      f"{speed:,.0f} tokens/s{mfu} | {left} left")
                log(step=step, tokens=step * tokens_per_step, train_loss=f"{loss.item():.6f}", lr=f"{lr:.6g}",
                    grad_norm=f"{norm.item():.6g}", tokens_per_s=f"{speed:.0f}", elapsed_s=f"{elapsed_before + elapsed:.1f}")
                train_seconds, counted_from = 0.0, step
            if evaluating:
                val_loss = evaluate(model, forward, val_data, c, autocast, device)
                check_finite(step, "validation loss", val_loss)
                print(f"step {step:,}: validation loss {val_loss:.4f}{', the best so far' if val_loss < best_val_loss else ''}")
                elapsed = elapsed_before + time.perf_counter() - start
                log(step=step, tokens=step * tokens_per_step, val_loss=f"{val_loss:.6f}", elapsed_s=f"{elapsed:.1f}")
                if val_loss < best_val_loss:
                    best_val_loss = val_loss
                    save_as("best.pt")
            if saving and step > first_step:
                save_as("ckpt.pt")
            if stopping or step >= c.max_iters:
                break
            running_since = time.perf_counter()

        torch.manual_seed(c.seed + step)   # dropout, like the data, depends on nothing but seed and step
        lr = lr_at(step, c)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = torch.zeros((), device=device)
        for sample in range(step * c.batch_size, (step + 1) * c.batch_size, micro):
            x, y = (t.to(device, non_blocking=True) for t in train_data.batch(range(sample, sample + micro)))
            with autocast:
                _, micro_loss = forward(x, y)
            micro_loss = micro_loss * (micro / c.batch_size)
            micro_loss.backward()
            loss += micro_loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        step += 1

    for s, handler in handlers.items():
        signal.signal(s, handler)
    if stopping:
        resume = " --init_from=resume" if (out / "ckpt.pt").exists() else ""   # before the first step there is nothing to resume
        print(f"{stop[0]}: stopped at step {step:,}; go on with\n  python train.py {shlex.join(argv)}{resume}")
        return
    curve = [float(r["val_loss"]) for r in log.rows if r["val_loss"]]
    print(f"\nvalidation loss {curve[0]:.2f} {sparkline(curve)} {curve[-1]:.4f}, the best {best_val_loss:.4f}, in {clock(elapsed)}\n")
    tokenizer = Tokenizer(meta["tokenizer"])
    tokens = model.eval().generate(torch.tensor([[tokenizer.start]], device=device), 256, top_k=200, vocab_size=tokenizer.vocab_size)
    print(f"{tokenizer.decode(tokens[0, 1:].tolist())}\n\nmore of it: python sample.py --out_dir={c.out_dir}")


if __name__ == "__main__":
    run(main)
