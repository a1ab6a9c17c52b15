"""
Checkpoints: everything needed to continue a run, to sample, or to start another run from.

One process, DDP and FSDP share one format: whole tensors by the names of the parameters. So a
checkpoint from any of them can be loaded by any other, with any number of processes.
"""

import pickle
import sys
import zipfile
from contextlib import contextmanager
from dataclasses import asdict

import torch
import torch.distributed as dist

from plumbing.errors import InputError, first_line
from plumbing.files import give_second_name, replacing

STATES = {   # what each optimizer keeps of a parameter
    "AdamW": {"step", "exp_avg", "exp_avg_sq"},
    "Muon": {"momentum_buffer"},
}
KEYS = {   # of a checkpoint, with the types of their values
    "model": dict,           # {name of a parameter: tensor}
    "optimizer": dict,       # {name of a parameter: {name of a state: tensor}}
    "gpt_config": dict,      # the fields of GPTConfig
    "train_config": dict,    # the fields of TrainConfig
    "step": int,             # optimizer steps done
    "best_val_loss": float,
    "tokenizer": dict,       # a tokenizer_spec, see tokenizer.py
    # and source_sha256, of the text that the dataset was prepared from; not in older ones
}


def save_checkpoint(path, model, optimizers, train_config, step, best_val_loss, meta):
    """
    Write the state of a run. meta is the dataset's, see token_files.py: its tokenizer and the hash
    of its source are kept.

    Every rank must call this, because sharded tensors are gathered from all of them; rank 0 writes.
    The file changes completely or not at all. Raises InputError if it cannot be written.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    state_of = {}
    for optimizer in optimizers:
        state_of.update(optimizer.state)
    tensors = {}
    states = {}
    for name, p in model.named_parameters():   # in the same order on every rank
        tensors[name] = gather(p, rank)
        if p in state_of:
            states[name] = {key: gather(t, rank) for key, t in state_of[p].items()}
    if rank > 0:
        return
    if model.config.tied:
        tensors["lm_head.weight"] = tensors["wte.weight"]   # torch.save writes their bytes once
    checkpoint = {
        "model": tensors,
        "optimizer": states,
        "gpt_config": asdict(model.config),
        "train_config": asdict(train_config),
        "step": step,
        "best_val_loss": best_val_loss,
        "tokenizer": meta["tokenizer"],
        "source_sha256": meta.get("source_sha256"),
    }
    with as_save_error(path), replacing(path) as f:
        torch.save(checkpoint, f)


def save_again(path, name):
    """The checkpoint just saved at path, under another name too: no byte is written twice."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        with as_save_error(name):
            give_second_name(path, name)


@contextmanager
def as_save_error(path):
    """An error while path is written becomes an InputError that says what to do."""
    try:
        yield
    except (OSError, RuntimeError) as e:   # torch reports a full disk as either
        while e.__context__ is not None and not isinstance(e, OSError):
            e = e.__context__   # what torch made an error of its own of
        raise InputError(
            f"cannot save {path} ({first_line(e)}): what was there before is untouched; once the "
            "problem is fixed, continue with --init_from=auto"
        ) from None


def gather(t, rank):
    """The whole of a tensor that may be sharded, on the CPU of rank 0; None on the other ranks."""
    if hasattr(t, "full_tensor"):   # FSDP: an all-gather, in which every rank takes part
        t = t.full_tensor()
    return t.detach().cpu() if rank == 0 else None


def load_checkpoint(path):
    """
    The dictionary that save_checkpoint wrote. InputError for another file, or a damaged one;
    whether the values in its configs make a model, GPTConfig checks.
    """
    checkpoint = open_checkpoint(path)
    if is_nanogpts(checkpoint):
        raise InputError(
            f"{path} is a checkpoint of nanoGPT, which cannot be resumed here: "
            f"--init_from={path} and another --out_dir start a new run from its weights"
        )
    check_checkpoint(checkpoint, path)
    return checkpoint


def open_checkpoint(path):
    """What a file holds, not looked at. Memory-mapped: one copy serves all processes."""
    return load_pickle(path, mmap=sys.platform != "win32")   # Windows could not replace the file


def is_nanogpts(checkpoint):
    return isinstance(checkpoint, dict) and "model_args" in checkpoint


def check_checkpoint(checkpoint, path):
    """InputError unless it has the keys that save_checkpoint writes."""
    if not isinstance(checkpoint, dict):
        raise InputError(f"{path} is not a checkpoint of train.py")
    for key, kind in KEYS.items():
        if not isinstance(checkpoint.get(key), kind):
            raise InputError(f"{path} is not a checkpoint of train.py: {key} is missing or broken")
    for key in ("gpt_config", "train_config"):
        for name, value in checkpoint[key].items():
            values = value if isinstance(value, (tuple, list)) else [value]
            if not all(isinstance(v, (str, int, float, type(None))) for v in (name, *values)):
                raise InputError(f"{path} is not a checkpoint of train.py: {key} is broken")
    if checkpoint["step"] < 0:
        raise InputError(f"{path} is not a checkpoint of train.py: step={checkpoint['step']}")
    if not all_tensors(checkpoint["model"]):
        raise InputError(f"{path} is not a checkpoint of train.py: model holds more than tensors")


def all_tensors(values):
    """Whether values is a dictionary that has a plain tensor with numbers under every name."""
    if not isinstance(values, dict):
        return False
    return all(type(k) is str and is_plain(t) for k, t in values.items())


def is_plain(t):
    """Not sparse, quantized or without data, all of which a file can hold"""
    return (type(t) is torch.Tensor and t.layout == torch.strided and t.device.type == "cpu"
            and not t.is_quantized and not t.is_complex())


def load_pickle(path, mmap=False):
    """What torch.save wrote, on the CPU. Raises InputError for what could run code when loaded."""
    try:
        check_bytes(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as e:   # its own text advises to trust the file
        if "GLOBAL" in str(e):   # the file names a function that torch does not know to be safe
            raise InputError(
                f"{path} holds more than tensors and plain values: loading it could run code"
            ) from None
        raise InputError(f"{path} is cut short or not a checkpoint") from None
    except Exception as e:   # torch reports a damaged file as RuntimeError, EOFError, OSError, ...
        raise InputError(
            f"{path} is cut short or not a checkpoint: {first_line(e) or repr(e)}"
        ) from None


def check_bytes(path):
    """
    torch.save writes a zip file with a checksum of each tensor, which torch.load does not look at.
    ValueError if a byte is not what it was.
    """
    if not zipfile.is_zipfile(path):   # older than torch 1.6
        return
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("it is compressed, which torch.save never does")
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"its part {damaged} has changed since it was written")


def restore(run, checkpoint, path):
    """
    Put what load_checkpoint returned, the model apart, into run, a Run of train.py. path is for
    errors.
    """
    optimizer = checkpoint["train_config"].get("optimizer", "adamw")
    if optimizer != run.c.optimizer:
        raise InputError(
            f"{path} was trained with optimizer={optimizer}, whose state {run.c.optimizer} cannot "
            f"use: --optimizer={optimizer} continues the run"
        )
    same_dataset = checkpoint["train_config"].get("dataset") == run.c.dataset
    source = checkpoint.get("source_sha256")
    if same_dataset and isinstance(source, str) and source != run.meta.get("source_sha256"):
        raise InputError(
            f"{path} was trained on a different text from the one now in data/{run.c.dataset}: "
            f"prepare that text again, or --init_from={path} and another --out_dir start a new run"
        )
    restore_optimizers(run.optimizers, run.model, checkpoint["optimizer"], path)
    run.step = checkpoint["step"]
    run.best_val_loss = checkpoint["best_val_loss"]


def restore_optimizers(optimizers, model, states, path):
    """
    Put back what save_checkpoint saved as "optimizer", sharded as the parameters are now. Raises
    InputError, with path in it, for the state of another model.
    """
    names = {p: name for name, p in model.named_parameters()}
    if states.keys() != set(names.values()):
        raise InputError(f"{path}: the optimizer's state is not of this model")
    for optimizer in optimizers:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for p in parameters:
            check_state(states[names[p]], p, STATES[type(optimizer).__name__], names[p], path)
        state = {}
        for i, p in enumerate(parameters):   # load_state_dict knows a parameter by this number
            state[i] = {key: shard_like(p, t) for key, t in states[names[p]].items()}
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def check_state(state, p, keys, name, path):
    """InputError for a state of other shapes, with which an optimizer would write out of bounds"""
    fits = all_tensors(state) and state.keys() == keys
    for key, t in (state.items() if fits else ()):
        shape = torch.Size() if key == "step" else p.shape
        fits = fits and t.shape == shape and t.dtype == torch.float32 and t.is_contiguous()
    if not fits:
        raise InputError(f"{path}: the optimizer's state of {name} is broken")


def shard_like(p, t):
    """This rank's shard of t; or t, if p is not sharded or t is a scalar such as a step count."""
    if t.dim() == 0 or not hasattr(p, "full_tensor"):
        return t
    from torch.distributed.tensor import distribute_tensor  # here: it takes half a second

    # Every rank has read all of t, and with src_data_rank=None takes its shard without sending.
    return distribute_tensor(t.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
