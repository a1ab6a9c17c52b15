"""
What stands around a run: settings from files and flags, the device, the other processes, the folder of results, errors as one line.
"""

import ast
import csv
import difflib
import functools
import inspect
import itertools
import json
import math
import os
import re
import sys
import time
import traceback
import types
import typing
import uuid
from dataclasses import fields
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from model import InputError
from weights import replacing


# ----------------------------------------------------------------------------------------------------------------------
# Settings: fields of dataclasses, set by plain Python files and by flags

def settings(argv, doc, *classes):
    """
    argv     config files, and --key=value, --key value or --flag, in any order; flags win over files, later over earlier
    doc      what --help prints above the list of all settings
    classes  dataclasses: what is not set keeps its default there
    returns  an instance of each class, then the set of the names that were given; raises ValueError for an unknown name, a
             wrong type or a file that cannot be run
    """
    kinds = {f.name: f.type for cls in classes for f in fields(cls)}
    from_files, from_flags, args = {}, {}, list(argv)
    while args:
        arg = args.pop(0)
        if arg in ("-h", "--help"):
            print_help(doc, classes)
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
    return *(cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values}) for cls in classes), set(values)


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


def print_help(doc, classes):
    print(doc)
    for cls in classes:
        print(f"{cls.__name__}: {cls.__doc__}")
        for f in fields(cls):
            comment = re.search(rf"^    {f.name}:.*?  # (.*)$", inspect.getsource(cls), re.MULTILINE)
            print(f"  --{f.name}={f.default}".ljust(36), comment[1] if comment else "")
        print()


# ----------------------------------------------------------------------------------------------------------------------
# The device

# bf16 matrix products a second by data sheet, dense. A device that is not listed gets no MFU rather than a wrong one.
PEAK_FLOPS = {"B200": 2250e12, "H200 NVL": 835e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12,
              "RTX 4090": 165e12, "RTX 3090": 71e12, "L4": 121e12}


def choose_device(device, dtype):
    """-> torch.device, bf16 or not, a line that says which and why. Under torchrun every process gets a GPU of its own."""
    asked, local_rank = device, os.environ.get("LOCAL_RANK")
    if asked != "auto":
        why = "as asked"
    elif torch.cuda.is_available():
        device, why = "cuda", torch.cuda.get_device_name()
    elif torch.backends.mps.is_available() and local_rank is None:   # several processes on an Apple GPU: torch cannot
        device, why = "mps", "Apple GPU"
    else:
        device, why = "cpu", f"no CUDA{'' if local_rank else ' or Apple'} GPU found; {torch.get_num_threads()} threads"
    if device.startswith("cuda:") and local_rank is not None:
        raise InputError(f"device={device}: torchrun gives each process a GPU of its own; leave --device out")
    if device == "cuda" and local_rank is not None:
        if int(local_rank) >= torch.cuda.device_count():
            raise InputError(f"process {local_rank} of this machine finds {torch.cuda.device_count()} GPU(s), counted from 0: start as many "
                             f"processes as there are GPUs, or hide them: CUDA_VISIBLE_DEVICES= torchrun ...")
        device = f"cuda:{local_rank}"
    try:
        device = torch.device(device)
        if device.type not in ("cuda", "mps", "cpu"):
            raise RuntimeError("must be auto, cuda, cuda:1, mps or cpu")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"device={asked}: {str(e).splitlines()[0]}; --device=auto takes what is there") from None
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)   # a "cuda" without number it refuses
        faster = 2 if torch.cuda.is_bf16_supported(including_emulation=False) else 0
    else:   # macOS: float32, which works on every version
        faster = across(bf16_speed(), dist.ReduceOp.MIN) if device.type == "cpu" and dtype == "auto" else 0
    bf16 = dtype == "bfloat16" or dtype == "auto" and faster > 1.3
    why_dtype = "as asked" if dtype != "auto" else f"bfloat16 is {'faster' if bf16 else 'not faster'} here"
    return device, bf16, f"device: {device} ({why}), {'bfloat16' if bf16 else 'float32'} ({why_dtype})"


@functools.cache
def bf16_speed():
    """How many times as fast as in float32 this CPU multiplies matrices in bfloat16: some have the instructions, and slow ones"""
    a, b = torch.ones(128, 768), torch.ones(768, 768)
    pairs, best = [(a, b), (a.bfloat16(), b.bfloat16())], [math.inf, math.inf]
    for _ in range(5):   # in turn, so that whatever else runs here slows both
        for i, (a, b) in enumerate(pairs):
            start = time.perf_counter()
            a @ b
            best[i] = min(best[i], time.perf_counter() - start)
    return best[0] / best[1]


def why_no_compiler(device):
    """None if torch.compile works on this machine, else what is in its way"""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as e:
        return f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0]:.200}"


def peak_flops(name):
    """The entry whose words all stand in the device's name ("NVIDIA H100 80GB HBM3"), or None."""
    words = set(name.replace("-", " ").split())
    return next((v for k, v in PEAK_FLOPS.items() if set(k.split()) <= words and not words & {"Laptop", "Ti", "D"}), None)


# ----------------------------------------------------------------------------------------------------------------------
# Several processes

def join():
    """Meet the processes that torchrun started -> the store (torchrun's table of keys and values), rank, world size; alone: None, 0, 1"""
    if "RANK" not in os.environ:
        return None, 0, 1
    if not {"LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise InputError("RANK is set, but not all that torchrun sets besides: start several processes with torchrun, one without RANK")
    store, rank, world = next(rendezvous("env://"))
    store = dist.PrefixStore(agree(store, rank, world), store)
    nccl = torch.cuda.is_available() and dist.is_nccl_available()   # both, for across() sends CPU tensors; unnamed, only one is made
    dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", store=store, rank=rank, world_size=world)
    if rank > 0:
        sys.stdout = open(os.devnull, "w")   # rank 0 speaks for all
    return store, rank, world


def agree(store, rank, world):
    """
    -> a fresh prefix for keys. When torchrun (2.13) restarts the processes it keeps the store, with the addresses of the dead
    ones in it. So each writes a random name under `rank N`; rank 0 answers every name it finds there with its own; whoever
    is alive reads the answer to its name and confirms. Names of the dead stay unconfirmed, and rank 0 tries again.
    """
    me = uuid.uuid4().hex
    store.set(f"rank {rank}", me)
    if rank > 0:
        name = store.get(f"name for {me}").decode()   # waits for it
        store.set(f"{name} reached {rank}", "")
        return name
    others, deadline = range(1, world), time.monotonic() + 1800
    while not all(store.check([f"{me} reached {r}"]) for r in others):
        for r in filter(lambda r: store.check([f"rank {r}"]), others):
            store.set(f"name for {store.get(f'rank {r}').decode()}", me)
        time.sleep(0.02)
        if time.monotonic() > deadline:
            raise InputError(f"not all of the {world} processes came within half an hour: see what the others say")
    return me


def in_turn(store, work):
    """
    work() on rank 0, then on the first process of each other machine, then on the rest -> what it returns. What the first
    downloads, the others find. They look at the store meanwhile: a download may outlast the time limit of a barrier.
    """
    if store is None:
        return work()
    mine = 0 if dist.get_rank() == 0 else 1 if os.environ["LOCAL_RANK"] == "0" else 2
    for turn in range(3):
        if turn == mine:
            result = work()
        wait_for_all(store, f"turn {turn}")
    return result


def wait_for_all(store, where):
    """Return when every process has called this with the same where. Nothing is sent between them, only counted in the store."""
    store.add(where, 1)
    while store.add(where, 0) < dist.get_world_size():
        if store.check(["why"]):
            raise InputError("another process failed")   # and has said why
        time.sleep(0.02)


def first_to_fail(store, e):
    """Called by every process that cannot go on; the first says why on stderr, and all report it to torchrun."""
    try:
        if store.add("failed", 1) == 1:
            print(explain(e), file=sys.stderr)
            store.set("why", explain(e))
        report(store.get("why").decode())
    except RuntimeError:   # the store is gone, and with it the process that kept it
        print(explain(e), file=sys.stderr)


def across(value, op=dist.ReduceOp.SUM):
    """The sum (or another op) over all processes of a number or bool; by way of the CPU, so that no GPU is waited for"""
    if dist.is_initialized():
        value = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(value, op)
        value = value.item()
    return value


# ----------------------------------------------------------------------------------------------------------------------
# What a run leaves and shows

def make_out_dir(out, keep):
    """Make the folder of a run; unless keep, an earlier run's files in it move to old1/, old2/, ..."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"out_dir={out}: {e.strerror}; name a folder that can be made and written to") from None
    there = [name for name in ("ckpt.pt", "best.pt", "metrics.csv") if (out / name).exists()]
    if there and not keep:
        old = next(path for n in itertools.count(1) if not (path := out / f"old{n}").exists())
        old.mkdir()
        for name in there:
            os.replace(out / name, old / name)
        print(f"an earlier run was there: {', '.join(there)} are now in {old}")


class Log:
    """
    metrics.csv: one row per printed line, fields left empty where a line does not have them. Losses in nats a token; tokens:
    trained on so far; elapsed_s: seconds since the run began, interruptions not counted.
    """
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
        self.start = time.perf_counter() - (float(self.rows[-1]["elapsed_s"] or 0) if self.rows else 0.0)
        with replacing(path) as f:
            f.write(("\n".join([",".join(self.FIELDS)] + [",".join(r[k] for k in self.FIELDS) for r in self.rows]) + "\n").encode())

    def elapsed(self):
        """Seconds since the run began, time between interruption and resumption not counted"""
        return time.perf_counter() - self.start

    def __call__(self, **row):
        row["elapsed_s"] = f"{self.elapsed():.1f}"
        self.rows.append({k: str(row.get(k, "")) for k in self.FIELDS})
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(",".join(self.rows[-1].values()) + "\n")


def sparkline(values):
    """[3.0, 2.0, 1.5] -> "█▄▁" """
    low, high = min(values), max(values)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (v - low) / (high - low or 1))] for v in values)


def clock(seconds):
    """4000 -> "1h06m", 65 -> "1m05s" """
    hours, minutes = divmod(int(seconds) // 60, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{int(seconds) % 60:02d}s"


# ----------------------------------------------------------------------------------------------------------------------
# Errors

def explain(e):
    """An exception -> one line on what is wrong and what to do; for a fault of the program the whole traceback."""
    text = (str(e).splitlines() or [""])[0]
    if isinstance(e, (InputError, OSError)):
        return f"error: {e}"
    if isinstance(e, KeyboardInterrupt):
        return "interrupted"
    if isinstance(e, (MemoryError, torch.OutOfMemoryError)) or isinstance(e, RuntimeError) and "allocate" in str(e):
        return ("error: not enough memory: in training a smaller micro_batch_size, block_size or n_embd takes less, as do "
                "--checkpoint_activations and, on several GPUs, --fsdp; in sampling --dtype=bfloat16, or --device=cpu")
    if isinstance(e, dist.DistNetworkError) or re.search("closed by peer|reset by peer|Broken pipe|remote process exited", str(e)):
        return f"error: another process is gone ({text:.200}); go on from the last checkpoint with --init_from=auto"
    return "".join(traceback.format_exception(e)).rstrip()


def report(line):
    """Leave line where torchrun looks for the root cause: it then ends its own report of a failure with it."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = dict(py_callstack=line, timestamp=str(int(time.time())))
        with replacing(path) as f:   # torchrun may look at any moment: it must find all of it or nothing
            f.write(json.dumps(dict(message=dict(message=line, extraInfo=extra))).encode())


def run(main):
    """main(sys.argv[1:]); what the user can put right ends as one line on stderr and exit status 1."""
    for stream in filter(None, (sys.stdout, sys.stderr)):   # a Windows console may lack a character; a log should show each line
        stream.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)
    try:
        main(sys.argv[1:])
    except BrokenPipeError:   # whoever read our output, `head` say, has seen enough
        os._exit(0)
    except (Exception, KeyboardInterrupt) as e:
        report(explain(e))
        if os.environ.get("LOCAL_RANK", "0") == "0":   # of several processes, which all read the same settings, one speaks
            print(explain(e), file=sys.stderr)
        sys.exit(1)
