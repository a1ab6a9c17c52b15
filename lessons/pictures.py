"""
Draws the pictures of the lessons from the code itself: who sees whom comes from visible() and the
cache, angles from rotate(), sizes from the model, and what is sent from a training step that is
watched. `python -m lessons.pictures` draws them all; attention.png is drawn from attention.csv,
which `python -m lessons.attention` has written.
"""

import csv
import math
from pathlib import Path

import torch

from lessons import watch
from lessons.attention import draw_maps
from lessons.drawing import ACCENT, DARK, LIGHT, MIDDLE, SHADES, figure, grid, save
from model import GPT, LayerCache, rotate, visible
from plumbing.errors import InputError, run_script
from train import load_config

HERE = Path(__file__).parent


# --------------------------------------------------------------------------------------------------
# Windows: who sees whom, the ring, and how far information travels

def seen_in_blocks(T, W):
    """(T,T): 0 = not computed, 1 = computed and masked, 3 = computed and seen"""
    pos = torch.arange(T)
    block_of_query = pos[:, None] // W
    block_of_key = pos // W
    back = block_of_query - block_of_key
    computed = (back == 0) | (back == 1)
    return computed.int() + 2 * (computed & visible(pos, pos, W)).int()


def ring_over_time(W, tokens):
    """(W, tokens): the position that each slot holds after each token; -1 = none"""
    cache = LayerCache((1, 1, W, 2), device="cpu", dtype=torch.float32)
    columns = []
    for p in range(tokens):
        kv = torch.zeros(1, 1, 1, 2)
        cache.write(kv, kv, torch.tensor([p]))
        columns.append(cache.pos.clone())
    return torch.stack(columns, dim=1)


def cone(L, T, W):
    """(L+1, T): where the last token depends on the input (row 0), and on what layer l puts out"""
    pos = torch.arange(T)
    sees = visible(pos, pos, W)
    reached = torch.zeros(T, dtype=torch.bool)
    reached[-1] = True
    rows = [reached]
    for _ in range(L):
        reached = (reached[:, None] & sees).any(dim=0)
        rows.append(reached)
    return torch.stack(rows[::-1])


def shade(ax, values, highest):
    from matplotlib.colors import ListedColormap
    ax.imshow(values.numpy(), cmap=ListedColormap(SHADES), vmin=0, vmax=highest, aspect="equal")


def draw_windows():
    T, W = 16, 4
    pos = torch.arange(T)
    fig, ((full, window, blocks), (ring, reach, key)) = figure(
        11, 5.8, 2, 3, gridspec_kw={"height_ratios": (2.2, 1)})
    for ax, title, values in (
        (full, "full attention", 1 + 2 * visible(pos, pos, 0).int()),
        (window, f"a window of W = {W}, by a mask", 1 + 2 * visible(pos, pos, W).int()),
        (blocks, f"in blocks of W = {W}", seen_in_blocks(T, W)),
    ):
        grid(ax, title, "key", "query")
        shade(ax, values, 3)
        ax.set_xticks(range(0, T, 4))
        ax.set_yticks(range(0, T, 4))
    for edge in range(W, T, W):
        blocks.axhline(edge - 0.5, color=ACCENT, linewidth=1.5)
        blocks.axvline(edge - 0.5, color=ACCENT, linewidth=1.5)
    draw_ring(ring, W, tokens=10)
    L = 4
    grid(reach, f"what token {T - 1} depends on", "token", "after layer")
    shade(reach, 3 * cone(L, T, W).int(), 3)
    reach.set_xticks(range(0, T, 4))
    reach.set_yticks(range(L + 1), ["input", *range(L)])
    reach.invert_yaxis()
    key.axis("off")
    for y, (shade_of, meaning) in enumerate((
            (DARK, "computed and seen"), (LIGHT, "computed, then masked"),
            ("white", "not computed"))):
        key.barh(-y, 1, height=0.6, color=shade_of, edgecolor=DARK)
        key.text(1.3, -y, meaning, va="center")
    key.set_xlim(-1, 8)
    key.set_ylim(-3, 1)
    save(fig, HERE / "windows.png")


def draw_ring(ax, W, tokens):
    slots = ring_over_time(W, tokens)
    grid(ax, f"the cache: positions in {W} slots", "tokens so far", "slot")
    shade(ax, torch.zeros_like(slots), 3)
    for slot in range(W):
        for time in range(tokens):
            position = slots[slot, time].item()
            if position >= 0:
                box = {"boxstyle": "square,pad=0.15", "facecolor": LIGHT, "edgecolor": DARK}
                ax.text(time, slot, position, ha="center", va="center", color="black",
                        bbox=box if position == time else None)
    ax.set_xticks(range(tokens), range(1, tokens + 1))
    ax.set_yticks(range(W))


# --------------------------------------------------------------------------------------------------
# RoPE: what distance does to a score

def scores_by_distance(D, distances, theta=10_000.0):
    """
    (D/2 + 1, len(distances)): q'k of a query and a key that are equal before the rotation, by their
    distance. One row for each pair of channels alone, the last for all of them.
    """
    rows = []
    for pairs in [*([d] for d in range(D // 2)), range(D // 2)]:
        x = torch.zeros(1, 1, 1, D)
        for d in pairs:
            x[..., d] = x[..., d + D // 2] = 1 / math.sqrt(2 * len(pairs))
        q = rotate(x, torch.zeros(1), theta)
        k = rotate(x.expand(1, 1, len(distances), D), distances, theta)
        rows.append((q @ k.mT).flatten())
    return torch.stack(rows)


def draw_rope():
    D, trained = 16, 128
    distances = torch.arange(0, 4 * trained)
    scores = scores_by_distance(D, distances)
    fig, axes = figure(9, 7, 3, 2, sharex=True, sharey=True)
    chosen = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    for (row, column), d in zip(chosen, (1, 2, 3, 4, 7), strict=True):
        turn = 2 * math.pi * 10_000 ** (2 * d / D)
        axes[row, column].set_title(f"pair {d}: one turn in {turn:,.0f} tokens")
        axes[row, column].plot(distances.numpy(), scores[d].numpy(), color=MIDDLE)
    axes[2, 1].set_title("all 8 pairs")
    axes[2, 1].plot(distances.numpy(), scores[-1].numpy(), color=DARK)
    for ax in axes.flat:
        ax.axvspan(trained, 4 * trained, color=LIGHT, alpha=0.5, linewidth=0)
        ax.axhline(0, color="#888888", linewidth=0.6)
        ax.set_xlim(0, 4 * trained)
    for ax in axes[2]:
        ax.set_xlabel("distance of key and query, tokens")
    for ax in axes[:, 0]:
        ax.set_ylabel("score")
    axes[2, 0].text(trained + 15, -0.7, "distances never seen in training", color=DARK)
    save(fig, HERE / "rope.png")


# --------------------------------------------------------------------------------------------------
# Memory of DDP and FSDP

PARTS = ("parameters", "gradients", "AdamW: mean gradient", "AdamW: mean squared gradient")


def draw_memory():
    _, config = load_config([str(HERE.parent / "config" / "gpt2_xl.py")])
    with torch.device("meta"):
        parameters = GPT(config).num_params()
    gigabytes = 4 * parameters / 1e9
    fig, ((ax,),) = figure(8, 4)
    bars = {"DDP, any number\nof processes": 1, "FSDP, 2 processes": 2, "FSDP, 8 processes": 8}
    for row, n in enumerate(bars.values()):
        for i, part in enumerate(PARTS):
            ax.barh(row, gigabytes / n, left=i * gigabytes / n, height=0.6,
                    color=(DARK, MIDDLE, LIGHT, "#ffffff")[i], edgecolor=DARK,
                    label=part if row == 0 else None)
        total = len(PARTS) * gigabytes / n
        ax.text(total + 0.3, row, f"{total:.1f} GB", va="center")
    ax.set_yticks(range(len(bars)), bars)
    ax.invert_yaxis()
    ax.set_xlim(0, 29)
    ax.set_xlabel(f"GB held by one process: GPT-2 XL, {parameters / 1e6:,.0f}M parameters")
    ax.legend(loc="lower right")
    save(fig, HERE / "memory.png")


# --------------------------------------------------------------------------------------------------
# A step, as it is watched

def draw_event(ax, x, kind, what, share):
    """share: the bytes that are sent, as a part of those of all parameters"""
    if kind == "send":
        colour = "white" if what == "all-gather" else DARK   # parameters, gradients
        ax.bar(x, -share, bottom=-0.15, width=0.8, color=colour, edgecolor=DARK)
        return
    name = {"embed": "e", "head": "h"}.get(what, what.removeprefix("block "))
    backward = kind == "backward"
    ax.bar(x, 0.3, width=0.94, color=MIDDLE if backward else LIGHT)
    ax.text(x, 0.14, name + "'" * backward, ha="center", va="center")


def draw_step():
    with torch.device("meta"):
        whole = 4 * GPT(watch.CONFIG).num_params()
    fig, axes = figure(11, 4.4, 2, 1, gridspec_kw={"height_ratios": (1.5, 0.75)})
    for (ax,), (mode, deepest) in zip(axes, {"ddp": 1.0, "fsdp": 0.25}.items(), strict=True):
        events = watch.watched_step(mode)
        for x, (kind, what, size) in enumerate(events):
            draw_event(ax, x, kind, what, size / whole)
        ax.set_xlim(-0.7, 46.6)
        ax.set_ylim(-0.15 - deepest, 0.4)
        ax.set_yticks([0.14, -0.15 - deepest / 2], ["computed", "sent"])
        ax.set_xticks([])
        ax.tick_params(length=0)
        sent = sum(size for _, _, size in events) / whole
        ax.set_title(f"{mode.upper()}: a process sends {sent:.1f} times the size of the model")
    axes[1, 0].set_xlabel(
        "e = embedding, 0 to 3 = blocks, h = head, with a prime: backward; "
        "hollow = parameters, filled = gradients")
    save(fig, HERE / "step.png")


# --------------------------------------------------------------------------------------------------
# What a trained model attends to

def draw_attention():
    with open(HERE / "attention.csv", encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f))
    draw_maps(rows, HERE / "attention.png")


def main(argv):
    if argv:
        raise InputError(f"lessons.pictures takes nothing more, found {' '.join(argv)}")
    draw_windows()
    draw_rope()
    draw_memory()
    draw_step()
    draw_attention()


if __name__ == "__main__":
    run_script(main)
