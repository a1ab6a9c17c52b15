"""
Draws assessment/*.png from results/*.csv. One idea per picture; a variant always has the same
colour and the same marker, so that the pictures can also be read in grey.
"""

import statistics

from assessment.claims import CONVERSIONS, LENGTHS, PARTS, print_means
from assessment.cost import VARIANTS, cache_bytes
from assessment.measure import HERE, read_results
from model import GPTConfig
from plumbing.errors import InputError

# style: colour, marker, line
STYLE = {
    "gpt2": ("#222222", "o", "-"),
    "rope": ("#1f77b4", "s", "--"),
    "gqa": ("#ff7f0e", "^", "-."),
    "swa": ("#2ca02c", "D", ":"),
    "modern": ("#d62728", "v", (0, (5, 1, 1, 1, 1, 1))),
    "rope_swa": ("#17becf", "P", (0, (4, 2))),
    "masked": ("#999999", "x", (0, (1, 1))),
    "random": ("#8c564b", "x", ":"),
    "first": ("#9467bd", "<", "--"),
    "mean": ("#ff7f0e", "^", "-."),
}


# ----------------------------------------------------------------------------------------------
# What is drawn: points are {x: (low, middle, high)}

def measured(what, variant, scale=1.0):
    """Rows of variants.csv -> {T: (smallest, median, largest)}"""
    points = {}
    for row in read_results("variants.csv"):
        if row["what"] == what and row["variant"] == variant:
            points[int(row["T"])] = [scale * float(row[k]) for k in ("low", "median", "high")]
    if not points:
        raise InputError(
            f"results/variants.csv has no {what} of {variant}: run python -m assessment cost --csv"
        )
    return points


def over_seeds(experiment, variant, data="shakespeare", by="step"):
    """Rows of papers.csv -> {step, or another column: (smallest, mean, largest) of the seeds}"""
    values = {}
    for row in read_results("papers.csv"):
        if (row["experiment"], row["variant"], row["data"]) == (experiment, variant, data):
            values.setdefault(int(row[by]), []).append(float(row["value"]))
    if not values:
        raise InputError(
            f"results/papers.csv has no {experiment} of {variant} on {data}: "
            "run python -m assessment claims"
        )
    return {x: (min(v), statistics.mean(v), max(v)) for x, v in values.items()}


def course(experiment, variant, data="shakespeare"):
    """The same by step, without step 0, where all models are alike"""
    points = over_seeds(experiment, variant, data)
    points.pop(0, None)
    return points


def final(experiment, variant, data="shakespeare"):
    """(smallest, mean, largest) after the last step"""
    points = over_seeds(experiment, variant, data)
    return points[max(points)]


def without_spread(points):
    return {x: (middle, middle, middle) for x, (_, middle, _) in points.items()}


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
    fig = Figure(figsize=(3.7 * len(labels), 3.2))
    fig.suptitle(title, fontsize=10)
    axes = fig.subplots(1, len(labels), squeeze=False)[0]
    for ax, (x, y) in zip(axes, labels, strict=True):
        ax.set(xlabel=x, ylabel=y)
    return fig, *axes


def line(ax, label, points, style, joined=True):
    """A line through the middles, with bars from low to high"""
    colour, marker, dashes = STYLE[style]
    xs = sorted(points)
    middles = [points[x][1] for x in xs]
    below = [points[x][1] - points[x][0] for x in xs]
    above = [points[x][2] - points[x][1] for x in xs]
    ax.errorbar(
        xs, middles, [below, above], label=label, color=colour, marker=marker,
        linestyle=dashes if joined else "", markersize=4, capsize=2, linewidth=1.4, elinewidth=0.8,
    )


def logarithmic_x(ax, ticks):
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [f"{x:,}" for x in ticks])
    ax.minorticks_off()


def logarithmic_y(ax, ticks):
    ax.set_yscale("log")
    ax.set_yticks(ticks, [f"{y:,}" for y in ticks])


def categories(ax, labels):
    """One place on the x axis for each label"""
    ax.set_xticks(range(len(labels)), labels)
    ax.set_xlim(-0.5, len(labels) - 0.5)


def save(fig, name):
    fig.tight_layout()
    fig.savefig(HERE / f"{name}.png", dpi=130)


# ----------------------------------------------------------------------------------------------
# The pictures

def draw_cost():
    fig, attention, size, speed = figure(
        "Cost: attention alone, the cache, and one more token",
        ("tokens T", "attention, forward and backward, ms"),
        ("tokens of context", "cache of GPT-2 124M in float32, MB"),
        ("tokens of context", "one more token, four blocks, ms"),
    )
    line(attention, "full", measured("attention", "full", 1e3), "gpt2")
    line(attention, "masked: W = 256", measured("attention", "masked", 1e3), "masked")
    line(attention, "in blocks: W = 256", measured("attention", "blocks", 1e3), "swa")
    logarithmic_x(attention, (1024, 4096, 16384))
    logarithmic_y(attention, (10, 100, 1000, 10000))
    attention.legend()

    lengths = [2**n for n in range(8, 16)]
    for name, switches in VARIANTS.items():
        megabytes = {n: cache_bytes(GPTConfig(**switches), n) / 1e6 for n in lengths}
        line(size, name, {n: (mb, mb, mb) for n, mb in megabytes.items()}, name)
        # Bars would hide each other.
        line(speed, name, without_spread(measured("decode", name, 1e3)), name)
    logarithmic_x(size, lengths[::2])
    logarithmic_y(size, (10, 100, 1000))
    size.legend()
    logarithmic_x(speed, sorted(measured("decode", "gpt2")))
    speed.set_ylim(bottom=0)
    save(fig, "cost")


def draw_rope():
    fig, steps, length = figure(
        "Rotary against learned positions: tiny Shakespeare, trained on 128 characters",
        ("step", "validation loss"),
        ("characters read at once", "loss of the last 64"),
    )
    line(steps, "gpt2", course("train", "gpt2"), "gpt2")
    line(steps, "rope", course("train", "rope"), "rope")
    steps.legend()

    line(length, "rope", over_seeds("length", "rope", by="length"), "rope")
    line(length, "rope, W = 32", over_seeds("length", "rope+W32", by="length"), "rope_swa")
    line(length, "rope, gqa, W = 32", over_seeds("length", "modern", by="length"), "modern")
    logarithmic_x(length, LENGTHS)
    length.legend()
    save(fig, "rope")


def draw_gqa():
    fig, heads, steps = figure(
        "Fewer key/value heads for eight query heads: tiny Shakespeare",
        ("key/value heads", "validation loss, trained so from the start"),
        ("steps of training after conversion (30 = 10%)", "validation loss, 2 heads"),
    )
    line(heads, "8 = multi-head", {8: final("train", "gpt2")}, "gpt2")
    line(heads, "grouped", {n: final("train", f"kv{n}") for n in (4, 2, 1)}, "gqa")
    logarithmic_x(heads, (1, 2, 4, 8))
    heads.legend()

    labels = {"random": "random", "first": "from the first", "mean": "from the mean"}
    for how in reversed(CONVERSIONS):
        line(steps, labels[how], over_seeds("convert", f"kv2 {how}"), how)
    line(steps, "not converted", over_seeds("convert", "multi-head"), "gpt2")
    steps.legend()
    save(fig, "gqa")


def draw_windows():
    fig, steps, depth, recall = figure(
        "Windows: a head start, and what is out of sight is gone",
        ("step, Python library", "validation loss"),
        ("four windows of mean 32, tiny Shakespeare", "validation loss"),
        ("window, with rope", "loss on lines said twice, 25 apart"),
    )
    line(steps, "full attention", course("longer", "gpt2", "stdlib"), "gpt2")
    line(steps, "W = 8", course("longer", "W8", "stdlib"), "swa")
    line(steps, "full, with rope", course("longer", "rope", "stdlib"), "rope")
    steps.legend()

    for i, name in enumerate(("shrinking", "W32", "growing")):
        line(depth, name, {i: final("train", name)}, "swa", joined=False)
    categories(depth, ["56 40\n24 8", "32 32\n32 32", "8 24\n40 56"])

    for i, name in enumerate(PARTS["recall"].variants):
        style = "rope" if name == "rope" else "rope_swa"
        line(recall, name, {i: final("recall", name, "recall")}, style, joined=False)
    categories(recall, ["4", "8", "16", "32", "4 full\n4 full", "full"])
    save(fig, "windows")


def draw_together():
    fig, seconds, ladder = figure(
        "All three together",
        (
            "seconds of training, the fastest of three seeds",
            "validation loss, T = 1,024, Python library",
        ),
        ("", "validation loss, T = 128, tiny Shakespeare"),
    )
    for name, label, style in (
        ("gpt2", "gpt2, 300 steps", "gpt2"),
        ("modern", "all three, 300 steps", "modern"),
        ("modern 540 steps", "all three, 540 steps", "rope_swa"),
    ):
        taken = over_seeds("seconds", name, "stdlib")
        losses = course("time", name, "stdlib")
        by_time = {taken[step][0]: loss for step, loss in losses.items()}
        line(seconds, label, by_time, style)
    seconds.legend()

    styles = {"gpt2": "gpt2", "kv2": "gqa", "rope": "rope", "W32": "swa", "modern": "modern"}
    for i, (name, style) in enumerate(styles.items()):
        line(ladder, name, {i: final("train", name)}, style, joined=False)
    categories(ladder, ["gpt2", "2 of 8\nkv heads", "rope", "W = 32", "all\nthree"])
    save(fig, "together")


def main(argv):
    if argv:
        raise InputError(f"plots takes nothing more, found {' '.join(argv)}")
    set_up_matplotlib()
    draw_cost()
    draw_rope()
    draw_gqa()
    draw_windows()
    draw_together()
    print_means()
