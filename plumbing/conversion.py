"""Fit the tensors of a trained model to another config, and copy tensors into a model."""

import sys

import torch

from plumbing.errors import InputError


def adapt(tensors, theirs, ours, path):
    """
    Change tensors, {name: tensor} of a model with the config theirs, to fit a model with the config
    ours. Raises InputError, with path in it, if that is impossible.
    """
    for field in ("vocab_size", "n_layer", "n_head", "n_embd", "bias", "tied"):
        asked = getattr(ours, field)
        found = getattr(theirs, field)
        if asked != found:
            raise InputError(f"{field}={asked}: {path} has {found}, which its weights decide")
    tensors = adapt_positions(dict(tensors), theirs, ours, path)
    return average_heads(tensors, theirs, ours, path)


def adapt_positions(tensors, theirs, ours, path):
    """Drop the learned positions if ours has RoPE, or those past a shorter block_size."""
    if theirs.use_rope and not ours.use_rope:
        raise InputError(
            f"use_rope=False: {path} was trained with RoPE and has no learned positions"
        )
    if ours.use_rope and not theirs.use_rope:
        tensors.pop("wpe.weight", None)
        print(f"warning: use_rope=True drops the learned positions of {path}: train the model "
              "before you use it", file=sys.stderr)
    elif not ours.use_rope and "wpe.weight" in tensors:
        if ours.block_size > theirs.block_size:
            raise InputError(
                f"block_size={ours.block_size}: {path} has only {theirs.block_size} positions"
            )
        if ours.block_size < theirs.block_size:
            tensors["wpe.weight"] = tensors["wpe.weight"][:ours.block_size]
    return tensors


def average_heads(tensors, theirs, ours, path):
    """Make each key/value head of ours the mean of those it replaces (GQA, section 2.1)."""
    H = ours.n_head
    D = ours.n_embd // H
    K = theirs.n_kv_head or H
    new_K = ours.n_kv_head or H
    if new_K == K:
        return tensors
    if K % new_K:
        raise InputError(
            f"n_kv_head={new_K}: {path} has {K} key/value heads, which can be averaged only to a "
            "divisor of that number"
        )
    for name, t in tensors.items():
        if ".c_attn." not in name:
            continue
        rows = (H + 2 * K) * D   # H query heads, K key heads, K value heads
        if t.shape[:1] != (rows,):
            raise InputError(
                f"{path}: {name} has shape {tuple(t.shape)}, but {H} query heads and twice {K} "
                f"key/value heads of {D} need {rows} rows"
            )
        q, kv = t.split((H * D, 2 * K * D))
        heads = kv.unflatten(0, (2 * new_K, K // new_K, D))
        tensors[name] = torch.cat((q, heads.mean(dim=1).flatten(0, 1)))
    return tensors


@torch.no_grad()
def copy_tensors(model, tensors, path):
    """
    Copy tensors, {name: tensor}, into the parameters of model, in its dtype. Raises InputError,
    with path in it, unless names and shapes are those of the model.
    """
    parameters = dict(model.named_parameters())
    missing = parameters.keys() - tensors.keys()
    unexpected = tensors.keys() - model.state_dict().keys()   # this lists a tied head too
    if missing:
        raise InputError(f"{path} lacks {listed(missing, 'tensor')}")
    if unexpected:
        raise InputError(f"{path} has {listed(unexpected, 'unexpected tensor')}")
    for name, p in parameters.items():
        found = tensors[name].shape
        if found != p.shape:
            raise InputError(f"{path}: {name} has shape {tuple(found)}, the model {tuple(p.shape)}")
        p.copy_(tensors[name])


def listed(names, what):
    """{"b", "a"}, "tensor" -> "2 tensors: a, b"; at most three names"""
    text = f"{len(names)} {what}"
    if len(names) != 1:
        text += "s"
    text += f": {', '.join(sorted(names)[:3])}"
    if len(names) > 3:
        text += ", …"
    return text
