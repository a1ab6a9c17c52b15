"""
Draws assessment/*.png from results/*.csv. One idea per picture. A variant always has the same
colour and, so that pictures can be read in grey, the same marker; other curves borrow them.
"""

from functools import partial

from assessment.claims import RATES
from assessment.cost import ATTENTION_LENGTHS, CONTEXTS, SWITCHES, WINDOW, cache_bytes
from assessment.measure import HERE
from assessment.small_models import (
    AFTER_CONVERSION,
    EVERY,
    FURTHER,
    FURTHER_STEPS,
    LENGTHS,
    LONG_STEPS,
    REPEATED,
    STEPS,
    TRAINED,
    recall_bounds,
)
from assessment.stretch import METHODS
from assessment.tables import (
    CONVERSIONS,
    NAMES,
    TITLES,
    claimed,
    difference,
    mean_of,
    medians_ms,
    percent_recalled,
)
from model import GPTConfig
from plumbing.errors import InputError

# style: colour, marker, line
STYLE = {
    "gpt2": ("#222222", "o", "-"),
    "rope": ("#1f77b4", "s", "--"),
    "gqa": ("#ff7f0e", "^", "-."),
    "swa": ("#2ca02c", "D", ":"),
    "modern": ("#d62728", "v", (0, (5, 1, 1, 1, 1, 1))),
    "masked": ("#999999", "x", (0, (1, 1))),
}


# ----------------------------------------------------------------------------------------------
# How it is drawn

def set_up_matplotlib():
    try:
        import matplotlib
    except ImportError:
        raise InputError(
            "plots need matplotlib, which is not installed: pip install -r requirements-dev.txt"
        ) from None
    matplotlib.rcParams.update({
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "legend.frameon": False,
    })


def figure(title, *labels):
    """A row of panels, one for each (label of x, label of y) -> the figure and its axes"""
    from matplotlib.figure import Figure
    fig = Figure(figsize=(max(5.2, 3.7 * len(labels)), 3.2))
    fig.suptitle(title, fontsize=10)
    axes = fig.subplots(1, len(labels), squeeze=False)[0]
    for ax, (x, y) in zip(axes, labels, strict=True):
        ax.set(xlabel=x, ylabel=y)
    return fig, *axes


def line(ax, label, points, style, halves=None, shift=0):
    """A line through {x: y}, with bars of ± {x: half}; shifted, so that bars stay apart"""
    colour, marker, dashes = STYLE[style]
    xs = sorted(points)
    ax.errorbar(
        [x + shift for x in xs], [points[x] for x in xs], halves and [halves[x] for x in xs],
        label=label, color=colour, marker=marker, linestyle=dashes, markersize=4, capsize=2,
        linewidth=1.4, elinewidth=0.8,
    )


def logarithmic_x(ax, ticks):
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [f"{x:,}" for x in ticks])
    ax.minorticks_off()


def logarithmic_y(ax, ticks):
    ax.set_yscale("log")
    ax.set_yticks(ticks, [f"{y:,}" for y in ticks])


def reference(ax, y, words):
    """A thin horizontal line, with what it stands for"""
    ax.axhline(y, color="#666666", linewidth=0.8)
    ax.annotate(words, (1, y), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                fontsize=8, color="#444444")


def save(fig, name):
    fig.tight_layout()
    fig.savefig(HERE / f"{name}.png", dpi=130, metadata={"Software": None})


# ----------------------------------------------------------------------------------------------
# The pictures

def draw_cost():
    fig, attention, size, speed = figure(
        "Cost: attention alone, the cache, and one more token",
        ("tokens T", "attention, forward and backward, ms"),
        ("tokens of context", "cache of GPT-2 124M in float32, MB"),
        ("tokens of context", "one more token, four blocks, ms"),
    )
    line(attention, "full", medians_ms("attention", "full", ATTENTION_LENGTHS), "gpt2")
    line(attention, f"masked: W = {WINDOW}",   # the longest mask was not measured: see cost.py
         medians_ms("attention", "masked", ATTENTION_LENGTHS[:-1]), "masked")
    line(attention, f"in blocks: W = {WINDOW}",
         medians_ms("attention", "blocks", ATTENTION_LENGTHS), "swa")
    logarithmic_x(attention, (1024, 4096, 16384))
    logarithmic_y(attention, (10, 100, 1000, 10000))
    attention.legend()

    lengths = [2**n for n in range(8, 16)]
    for name, switches in SWITCHES.items():
        line(speed, TITLES[name], medians_ms("decode", name, CONTEXTS), name)
        if name != "rope":   # its cache is gpt2's
            line(size, "gpt2, rope" if name == "gpt2" else TITLES[name],
                 {n: cache_bytes(GPTConfig(**switches), n) / 1e6 for n in lengths}, name)
    logarithmic_x(size, lengths[::2])
    logarithmic_y(size, (10, 100, 1000))
    size.legend()
    logarithmic_x(speed, CONTEXTS)
    speed.set_ylim(bottom=0)
    speed.legend()
    save(fig, "cost")


def differences(places, new, old):
    """new(place) and old(place) -> {seed: loss}. -> {place: mean}, {place: half of its interval}"""
    means, halves = {}, {}
    for place in places:
        means[place], halves[place] = difference(new(place), old(place))
    return means, halves


def against_gpt2(ax, losses, places, apart):
    """
    A line with intervals for each other variant. losses(variant, place) -> {seed: loss}; apart: by
    how much the lines are shifted, so that their bars do not hide each other
    """
    variants = NAMES[1:]
    for i, name in enumerate(variants):
        means, halves = differences(places, partial(losses, name), partial(losses, "gpt2"))
        shift = apart * (i - (len(variants) - 1) / 2)
        line(ax, TITLES[name], means, name, halves, shift)
    ax.axhline(0, color=STYLE["gpt2"][0], linewidth=1)
    ax.legend(ncols=2)


def draw_rates():
    fig, ax = figure("Each variant against gpt2, both at the same learning rate",
                     ("learning rate (Muon)", "loss minus gpt2's, 300 steps"))

    def losses(name, i):
        return claimed("rates", f"{name} muon {RATES[i]}")
    against_gpt2(ax, losses, range(len(RATES)), apart=0.06)
    ax.set_xticks(range(len(RATES)), RATES)
    save(fig, "rates")


def draw_convergence():
    fig, ax = figure(f"The lead over gpt2 while training {LONG_STEPS} steps",
                     ("step", "loss minus gpt2's"))

    def losses(name, step):
        return claimed("text", name, step=step)
    against_gpt2(ax, losses, range(EVERY, LONG_STEPS + 1, EVERY), apart=8)
    save(fig, "convergence")


STYLE_OF_METHOD = {   # borrowed
    "plain": "gpt2",
    "interpolation": "rope",
    "ntk": "gqa",
    "yarn": "swa",
    "window": "modern",
    "sinks": "masked",
}


def draw_stretch():
    """One panel before further training, one after it, with the same axes"""
    fig, *panels = figure(
        f"RoPE, trained on {TRAINED} characters: the same 64 characters, after more and more text",
        ("characters read together", "their loss, without further training"),
        ("characters read together", f"after {FURTHER_STEPS} more steps, on {FURTHER}"),
    )
    for ax, step in zip(panels, (STEPS, STEPS + FURTHER_STEPS), strict=True):
        for method in METHODS:
            points = {T: mean_of(claimed("stretch", "rope", method, step, T)) for T in LENGTHS}
            line(ax, method, points, STYLE_OF_METHOD[method])
        logarithmic_x(ax, LENGTHS)
    low = min(ax.get_ylim()[0] for ax in panels)
    high = max(ax.get_ylim()[1] for ax in panels)
    for ax in panels:
        ax.set_ylim(low, high)
    panels[1].legend(ncols=2)
    save(fig, "stretch")


def draw_recall():
    fig, right, loss = figure(
        "Lines of random letters, each written twice: what is known of the second copy",
        ("how far back the first stands", "letters known, %"),
        ("step", "validation loss"),
    )
    for variant in NAMES:
        shares = {n + 1: mean_of(percent_recalled(variant, n + 1)) for n in REPEATED}
        line(right, TITLES[variant], shares, variant)
        steps = {step: mean_of(claimed("recall", variant, step=step))
                 for step in range(EVERY, LONG_STEPS + 1, EVERY)}
        line(loss, TITLES[variant], steps, variant)
    right.set_ylim(0, 102)
    right.set_xticks([n + 1 for n in REPEATED])
    reference(right, 100 / 26, "a guess")
    guessing, knowing = recall_bounds()
    reference(loss, guessing, "no line known from the one before")
    reference(loss, knowing, "every line that can be known")
    loss.legend(loc="lower left", bbox_to_anchor=(0, 0.08), ncols=2, fontsize=7)
    save(fig, "recall")


def draw_heads():
    fig, heads, steps = figure(
        "Fewer key/value heads for eight query heads, eight seeds",
        ("key/value heads", "loss minus that of 8 heads"),
        ("steps of training after conversion", "loss minus the unconverted model's"),
    )

    def trained(n):
        return claimed("heads", f"{n} heads")

    def continued(how, step):
        return claimed("heads", "8 heads", how, step)
    means, halves = differences((4, 2, 1), trained, lambda n: trained(8))
    line(heads, None, means, "gqa", halves)
    heads.axhline(0, color=STYLE["gpt2"][0], linewidth=1)
    logarithmic_x(heads, (1, 2, 4))
    unconverted = partial(continued, "not converted")
    for (how, label), style in zip(CONVERSIONS.items(), NAMES[1:], strict=True):   # borrowed
        # not at step 0, which is so far off that the others would lie on one line
        means, halves = differences(AFTER_CONVERSION[1:], partial(continued, how), unconverted)
        line(steps, label, means, style, halves)
    steps.axhline(0, color=STYLE["gpt2"][0], linewidth=1)
    steps.legend(fontsize=8)
    save(fig, "heads")


PICTURES = (draw_cost, draw_rates, draw_convergence, draw_stretch, draw_recall, draw_heads)


def main(argv):
    if argv:
        raise InputError(f"plots takes nothing more, found {' '.join(argv)}")
    set_up_matplotlib()
    for draw in PICTURES:
        draw()
