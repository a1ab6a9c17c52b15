"""
What a trained model attends to: maps of some heads for a prompt, without a window and with one.

  python -m lessons.attention --out_dir=out-shakespeare --prompt="ROMEO:"
  python -m lessons.attention --out_dir=out-shakespeare --prompt="ROMEO:" --layers=1 --heads=0,3

  --out_dir=FOLDER   of a run of train.py (or other weights: whatever GPT.from_pretrained takes)
  --prompt=TEXT      what the model reads; it continues the text itself up to --tokens
  --tokens=24        how many tokens are shown; at most block_size
  --layers=0,1       which layers; the default is the first and the last
  --heads=0,1        which heads of each; the default is the first two
  --window_size=8    of the model with a window

Writes attention.csv and attention.png into the folder (or here, if there is no such folder). A row
of a map is a query, a column a key; the darker, the more of the query's attention the key gets.
"""

import csv
import math
from pathlib import Path

import torch

from lessons.drawing import figure, save
from model import GPT, copy_heads, rotate, visible
from plumbing.errors import InputError, as_input_error, run_script
from plumbing.tokenizer import Tokenizer

FIELDS = ("window", "layer", "head", "query", "key", "key_text", "weight")
DEFAULTS = {"out_dir": "out-shakespeare", "prompt": "ROMEO:", "tokens": "", "layers": "",
            "heads": "", "window_size": "8"}


@torch.no_grad()
def attention_weights(model, idx):
    """
    {layer: (H,T,T)}: softmax(q k' / sqrt(D)) of every layer, for the row of idx (1,T). The fused
    kernels that model.py uses return the weighted sum alone. So each layer's input is caught on its
    way, and the weights are computed again from it.
    """
    inputs = {}
    handles = []
    for i, block in enumerate(model.h):
        def catch(module, args, i=i):
            inputs[i] = args[0]
        handles.append(block.attn.register_forward_pre_hook(catch))
    model(idx)
    for handle in handles:
        handle.remove()
    return {i: weights_of_layer(block.attn, inputs[i]) for i, block in enumerate(model.h)}


def weights_of_layer(attn, x):
    """x (1,T,C) -> (H,T,T)"""
    T = x.shape[1]
    pos = torch.arange(T)
    heads = attn.c_attn(x).view(1, T, -1, attn.D).transpose(1, 2)
    q, k, _ = heads.split((attn.H, attn.K, attn.K), dim=1)
    if attn.theta is not None:
        q = rotate(q, pos, attn.theta)
        k = rotate(k, pos, attn.theta)
    scores = q @ copy_heads(k, attn.H).mT / math.sqrt(attn.D)
    scores = scores.masked_fill(~visible(pos, pos, attn.window), -torch.inf)
    return scores.softmax(dim=-1)[0]


def rows_of_maps(model, idx, tokenizer, layers, heads):
    window = max(model.config.windows)
    texts = [tokenizer.decode([token]) for token in idx[0].tolist()]
    for layer, weights in attention_weights(model, idx).items():
        if layer not in layers:
            continue
        for head in heads:
            for query in range(len(texts)):
                for key in range(query + 1):
                    weight = f"{weights[head, query, key].item():.3f}"
                    values = (window, layer, head, query, key, texts[key], weight)
                    yield dict(zip(FIELDS, values, strict=True))


def draw_maps(rows, path):
    """rows: dictionaries with the FIELDS, as a CSV file gives them back"""
    texts = {int(row["key"]): row["key_text"] for row in rows}
    labels = [texts[i].replace("\n", "\\n").replace(" ", "·") for i in range(len(texts))]
    T = len(texts)
    maps = {}   # {layer: {(head, window): (T,T)}}
    for row in rows:
        of_layer = maps.setdefault(int(row["layer"]), {})
        values = of_layer.setdefault((int(row["head"]), int(row["window"])), torch.zeros(T, T))
        values[int(row["query"]), int(row["key"])] = float(row["weight"])
    columns = len(next(iter(maps.values())))
    size = max(2.4, 0.12 * T)   # of a map, in inches
    fig, axes = figure(columns * size + 0.5, len(maps) * (size + 0.3), len(maps), columns)
    for row_of_axes, layer in zip(axes, sorted(maps), strict=True):
        for ax, (head, window) in zip(row_of_axes, sorted(maps[layer]), strict=True):
            ax.imshow(maps[layer][head, window].numpy(), cmap="Greys", vmin=0, vmax=1)
            ending = f", window {window}" if window else ""
            ax.set_title(f"layer {layer}, head {head}{ending}")
            ax.set_xticks(range(T), labels, fontsize=9, family="monospace")
            ax.set_yticks(range(T), labels, fontsize=9, family="monospace")
            ax.tick_params(length=0, pad=1)
    save(fig, path)


def read_arguments(argv):
    options = dict(DEFAULTS)
    for argument in argv:
        name, equals, value = argument.removeprefix("--").partition("=")
        if not equals or name not in options:
            raise InputError(f"{argument}: expected --NAME=VALUE with one of {', '.join(options)}")
        options[name] = value
    return options


def numbers(text, name, below):
    """ "0,3" -> [0, 3] """
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) < below for part in parts):
        raise InputError(f"--{name}={text}: expected numbers below {below}, such as 0")
    return sorted({int(part) for part in parts})


def number(text, name, most):
    if not text.isdecimal() or not 1 <= int(text) <= most:
        raise InputError(f"--{name}={text}: expected one number from 1 to {most}")
    return int(text)


def main(argv):
    if argv == ["--help"]:
        print(__doc__)
        return
    options = read_arguments(argv)
    out_dir = options["out_dir"]
    with as_input_error():
        plain = GPT.from_pretrained(out_dir, use_swa=False, window_size=None)
    if plain.tokenizer_spec is None:
        raise InputError(f"{out_dir} has no tokenizer, so there is no text to read")
    tokenizer = Tokenizer(plain.tokenizer_spec)
    most = plain.config.block_size
    T = number(options["tokens"] or str(min(24, most)), "tokens", most)
    W = number(options["window_size"], "window_size", 2**31 - 1)
    L = plain.config.n_layer
    H = plain.config.n_head
    layers = numbers(options["layers"] or f"0,{L - 1}", "layers", L)
    heads = numbers(options["heads"] or ",".join(map(str, range(min(2, H)))), "heads", H)
    with as_input_error():
        windowed = GPT.from_pretrained(out_dir, use_swa=True, window_size=W)
        idx = torch.tensor([tokenizer.encode(options["prompt"])], dtype=torch.int64)
        missing = max(0, T - idx.shape[1])
        idx = plain.generate(idx, missing, temperature=0, vocab_size=tokenizer.vocab_size)[:, :T]

    rows = []
    for model in (plain, windowed):
        rows += rows_of_maps(model, idx, tokenizer, layers, heads)
    folder = Path(out_dir) if Path(out_dir).is_dir() else Path(".")
    with open(folder / "attention.csv", "w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw_maps(rows, folder / "attention.png")
    print(f"wrote {folder / 'attention.csv'} and {folder / 'attention.png'}")


if __name__ == "__main__":
    run_script(main)
