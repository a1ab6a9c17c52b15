"""
The tables of the pages, from results/. Each of TABLES is a function that returns the columns and
{name of a row: cells}; figures.py puts them into the pages.
"""

import functools
import statistics

from assessment import claims
from assessment.claims import ADAMW_RATES, PARTS, RATES
from assessment.cost import ATTENTION_LENGTHS, SWITCHES, size_of
from assessment.measure import RESULTS, interval, read_results
from assessment.small_models import (
    AFTER_CONVERSION,
    FURTHER_STEPS,
    LENGTHS,
    LONG_STEPS,
    RATE,
    REPEATED,
    STEPS,
)
from assessment.stretch import METHODS
from model import GPTConfig
from plumbing.errors import InputError

NAMES = list(claims.VARIANTS)
TITLES = {name: name for name in NAMES} | {"modern": "all three"}
SAMPLED = 60   # characters of a text


# ----------------------------------------------------------------------------------------------
# Values by seed, and their paired differences

@functools.cache
def rows_of(name):
    return read_results(name)


def values_of(rows, part, variant, measure="loss", step=None, length=None):
    """{seed: value}; without a step, of the last one"""
    by_step = {}
    lengths = set()
    for row in rows:
        if (row["part"], row["variant"], row["measure"]) != (part, variant, measure):
            continue
        if length in (None, int(row["length"])) and step in (None, int(row["step"])):
            lengths.add(row["length"])
            by_step.setdefault(int(row["step"]), {})[int(row["seed"])] = float(row["value"])
    if len(lengths) > 1:
        raise InputError(f"claims.csv: {part}, {variant}, {measure} at {len(lengths)} lengths")
    values = by_step[max(by_step)] if by_step else {}
    seeds = PARTS[part].seeds
    if len(values) != seeds:   # a mean over fewer could hide the worst
        raise InputError(f"claims.csv: {measure} of {part}, {variant}: {len(values)} of {seeds} "
                         f"seeds; run python -m assessment claims --again {part}")
    return values


@functools.cache
def rows_of_claims():
    for job in claims.missing_or_changed(claims.finished()):
        name = " ".join(map(str, job))
        raise InputError(f"claims.csv: {name} is missing or has other flags than now: run "
                         f"python -m assessment claims {job.part}")
    return read_results("claims.csv")


def claimed(*args, **kwargs):
    return values_of(rows_of_claims(), *args, **kwargs)


def mean_of(values):
    return statistics.mean(values.values())


def difference(new, old):
    """{seed: value} twice -> mean of new - old over the seeds, and half of its 95% interval"""
    if new.keys() != old.keys():
        raise InputError(f"claims.csv: seeds {sorted(new)} cannot be paired with {sorted(old)}")
    return interval([new[seed] - old[seed] for seed in new])


def against(new, old, spec=".3f"):
    """'-0.139 ± 0.016', with a warning if the interval holds 0"""
    mean, half = difference(new, old)
    words = f"{mean:+{spec}} ± {half:{spec}}"
    return f"{words}, not resolved" if abs(mean) <= half else words


def percent(values):
    return {seed: 100 * value for seed, value in values.items()}


def best_rate(variant, optimizer="muon"):
    """The learning rate with the lowest mean loss, and {seed: loss} there"""
    tried = RATES if optimizer == "muon" else ADAMW_RATES
    losses = {rate: claimed("rates", f"{variant} {optimizer} {rate}") for rate in tried}
    rate = min(tried, key=lambda rate: mean_of(losses[rate]))
    return rate, losses[rate]


def percent_recalled(variant, distance):
    """{seed: percent}"""
    return percent(claimed("recall", variant, "recall", length=distance))


def mean_and_range(values, spec=".0f", unit="%"):
    """'68% (52 to 81)'"""
    low, high = min(values.values()), max(values.values())
    return f"{mean_of(values):{spec}}{unit} ({low:{spec}} to {high:{spec}})"


# ----------------------------------------------------------------------------------------------
# Costs

def row_of_variants(what, variant, T):
    """The row of variants.csv"""
    for row in rows_of("variants.csv"):
        if (row["what"], row["variant"], row["T"]) == (what, variant, str(T)):
            return row
    raise InputError(f"variants.csv has no {what} of {variant} at {T}: run "
                     "python -m assessment cost --csv")


def median(what, variant, T):
    return float(row_of_variants(what, variant, T)["median"])


def medians_ms(what, variant, lengths):
    """{T: median}"""
    return {T: 1e3 * median(what, variant, T) for T in lengths}


def step_memory(variant, T):
    """That of a training step, times gpt2's"""
    return f"{median('memory', variant, T) / median('memory', 'gpt2', T):.2f}"


def ratio(what, variant, T):
    """How many times as fast as gpt2: '1.24 ± 0.03'"""
    if variant == "gpt2":
        return "1.00"
    row = row_of_variants(what, variant, T)
    return f"{float(row['times_as_fast']):.2f} ± {float(row['half']):.2f}"


def sizes():
    return {name: size_of(GPTConfig(**switches)) for name, switches in SWITCHES.items()}


SPEEDS = (("prefill", 4096), ("decode", 1024), ("decode", 4096), ("decode 8", 4096))


def speeds():
    columns = ["training, T = 2,048", "memory of a step", "prompt of 4,096",
               "one token after 1,024", "4,096", "4,096, batch 8"]
    rows = {}
    for name, title in TITLES.items():
        rows[title] = [ratio("step", name, 2048), step_memory(name, 2048)]
        rows[title] += [ratio(what, name, T) for what, T in SPEEDS]
    return columns, rows


def full_over_blocks(what, T):
    return median(what, "full", T) / median(what, "blocks", T)


def attention():
    """How many times as fast blocks are as full attention, and their memory, by length"""
    forward, both, memory = [], [], []
    for T in ATTENTION_LENGTHS:
        forward.append(f"{full_over_blocks('attention forward', T):.1f}")
        both.append(f"{full_over_blocks('attention', T):.1f}")
        memory.append(f"{1 / full_over_blocks('attention memory', T):.2f}")
    columns = [f"{T:,}" for T in ATTENTION_LENGTHS]
    return columns, {"full / blocks, forward": forward, "forward and backward": both,
                     "memory, blocks / full": memory}


def speed():
    """The whole project beside the others, from speed.csv"""
    works = {}
    for row in rows_of("speed.csv"):
        works.setdefault(row["work"], {})[row["who"]] = row
    rows = {}
    for work, runs in works.items():
        if "plainGPT" not in runs or len(runs) < 2:   # not a comparison with another project
            continue
        ours = runs.pop("plainGPT")
        who, theirs = next(iter(runs.items()))
        ratio = float(ours["median"]) / float(theirs["median"])
        if ours["unit"] != "tokens/s":   # of times the shorter is better
            ratio = 1 / ratio
        cells = []
        for name, row in (("plainGPT", ours), (who.split()[0], theirs)):
            middle, low, high = [f"{float(row[key]):,.4g}" for key in ("median", "low", "high")]
            cells.append(f"{name}: {middle} {row['unit']} ({low} to {high})")
        rows[work] = [*cells, f"{ratio:.1f}"]
    return ["", "beside", "ratio"], rows


# ----------------------------------------------------------------------------------------------
# Losses

def rates_of(names, optimizer, tried):
    _, base = best_rate("gpt2", optimizer)
    rows = {}
    for name in names:
        cells = [f"{mean_of(claimed('rates', f'{name} {optimizer} {rate}')):.3f}" for rate in tried]
        rate, losses = best_rate(name, optimizer)
        best = tried.index(rate)
        cells[best] = f"**{cells[best]}**"
        cells.append("" if name == "gpt2" else against(losses, base))
        rows[TITLES[name]] = cells
    return [*tried, "best minus gpt2's best"], rows


def rates():
    return rates_of(NAMES, "muon", RATES)


def adamw():
    return rates_of(["gpt2", "rope"], "adamw", ADAMW_RATES)


def factorial():
    base = claimed("factorial", "gpt2")
    rows = {}
    for name in PARTS["factorial"].variants:
        losses = claimed("factorial", name)
        title = "all three" if name == "rope+gqa+swa" else name
        rows[title] = [f"{mean_of(losses):.3f}", "" if name == "gpt2" else against(losses, base)]
    return ["loss", "minus gpt2's"], rows


def windows():
    full = claimed("rates", f"gpt2 muon {RATE}")
    found = {
        "full": full,
        "32 in every layer": claimed("rates", f"swa muon {RATE}"),
        "8 in every layer": claimed("windows", "8"),
        "8 24 40 56": claimed("windows", "growing"),
        "56 40 24 8": claimed("windows", "shrinking"),
    }
    rows = {}
    for name, losses in found.items():
        compared = "" if name == "full" else against(losses, full)
        rows[name] = [f"{mean_of(losses):.3f}", compared]
    return ["loss", "minus full attention's"], rows


def convergence():
    rows = {}
    for name, title in TITLES.items():
        cells = []
        for step in (STEPS, LONG_STEPS):
            losses, base = [claimed("text", variant, step=step) for variant in (name, "gpt2")]
            cells += [f"{mean_of(losses):.3f}", "" if name == "gpt2" else against(losses, base)]
        rows[title] = cells
    return [f"{STEPS} steps", "minus gpt2's", f"{LONG_STEPS} steps", "minus gpt2's"], rows


def text():
    measures = ("real words", "repetition", "distinct-4")
    base = percent(claimed("text", "gpt2", "real words"))
    rows = {}
    for name, title in TITLES.items():
        values = [percent(claimed("text", name, measure)) for measure in measures]
        means = [f"{mean_of(by_seed):.1f}%" for by_seed in values]
        rows[title] = [*means, "" if name == "gpt2" else against(values[0], base, ".1f")]
    human = [percent(claimed("text", "gpt2", f"{measure}, Shakespeare")) for measure in measures]
    rows["Shakespeare"] = [*(f"{mean_of(values):.1f}%" for values in human), ""]
    return [*measures, "real words, minus gpt2's"], rows


def samples():
    """The beginning of the first text of each model of seed 1"""
    rows = {}
    for name, title in TITLES.items():
        path = RESULTS / f"text-{name}-1.txt"
        words = " / ".join(path.read_text(encoding="utf-8")[:SAMPLED].split("\n"))
        rows[title] = [words.replace("/  /", "/").strip(" /")]
    return ["the text"], rows


def stretch():
    rows = {}
    for method in METHODS:
        cells = []
        for step in (STEPS, STEPS + FURTHER_STEPS):
            for T in LENGTHS:
                cells.append(f"{mean_of(claimed('stretch', 'rope', method, step, T)):.2f}")
        rows[method] = cells
    columns = [f"{T:,}" for T in LENGTHS] + [f"{T:,} after" for T in LENGTHS]
    return columns, rows


def recall():
    rows = {}
    for variant in PARTS["recall"].variants:
        shares = [percent_recalled(variant, n + 1) for n in REPEATED]
        rows[TITLES.get(variant, variant)] = [mean_and_range(values) for values in shares]
    return [f"{n + 1} back" for n in REPEATED], rows


def heads():
    base = claimed("heads", "8 heads")
    rows = {}
    for n in (8, 4, 2, 1):
        losses = claimed("heads", f"{n} heads")
        rows[f"{n} of 8"] = [f"{mean_of(losses):.3f}", "" if n == 8 else against(losses, base)]
    return ["loss", "minus 8 heads'"], rows


CONVERSIONS = {
    "mean of 4": "2 heads, the mean",
    "first of 4": "2 heads, the first",
    "mean of 8": "1 head, the mean",
    "first of 8": "1 head, the first",
}


def converted():
    rows = {}
    last = claimed("heads", "8 heads", "not converted", AFTER_CONVERSION[-1])
    for measure, title in (CONVERSIONS | {"not converted": "8 heads, not converted"}).items():
        losses = [claimed("heads", "8 heads", measure, step) for step in AFTER_CONVERSION]
        compared = "" if measure == "not converted" else against(losses[-1], last)
        rows[title] = [*(f"{mean_of(values):.3f}" for values in losses), compared]
    shares = [f"{100 * step // STEPS}%" for step in AFTER_CONVERSION]
    return [*shares, f"at {shares[-1]}, minus not converted"], rows


# ----------------------------------------------------------------------------------------------
# All in one

PITFALLS = {
    "gpt2": "ends at its last position",
    "rope": "fails past the trained length",
    "gqa": "converted weights need training",
    "swa": "sees W - 1 back per layer",
    "modern": "those of swa and gqa",
}
CHALLENGES = {
    "gpt2": "the tanh form of GELU",
    "rope": "float32 angles; keys rotated once, before the cache",
    "gqa": "which heads share",
    "swa": "linear time; a ring of keys",
    "modern": "a slot of the ring is not a position",
}
QUESTIONS = {   # and the section that answers more
    "Size, parameters": "size-compute-memory",
    "Compute, FLOPs per token, T = 16,384": "size-compute-memory",
    "Memory, cache of 16,384 tokens": "size-compute-memory",
    "Speed of training": "speed",
    "Speed of decoding": "speed",
    "Performance: loss after 300 steps": "loss-each-at-its-best-learning-rate",
    "Convergence: loss after 900": "convergence",
    "Text: real words": "quality-of-generated-text",
    "Long range: recalled, 49 back": "long-range",
    "Pitfall": "challenges-and-pitfalls",
    "Challenge": "challenges-and-pitfalls",
}


def answers(name):
    """The scoreboard's column of a variant, in the order of QUESTIONS"""
    size = sizes()[name]
    _, losses = best_rate(name)
    late = claimed("text", name)
    words = percent(claimed("text", name, "real words"))
    if name == "gpt2":
        compared = [f"{mean_of(losses):.3f}", f"{mean_of(late):.3f}", f"{mean_of(words):.1f}%"]
    else:
        _, base = best_rate("gpt2")
        base_words = percent(claimed("text", "gpt2", "real words"))
        compared = [against(losses, base), against(late, claimed("text", "gpt2")),
                    against(words, base_words, ".1f")]
    return [
        size.parameters, size.flops_16384, size.cache_16384,
        ratio("step", name, 2048), ratio("decode 8", name, 4096),
        *compared, mean_and_range(percent_recalled(name, 49)), PITFALLS[name], CHALLENGES[name],
    ]


def scoreboard():
    columns = [answers(name) for name in NAMES]
    rows = {}
    for (question, section), *cells in zip(QUESTIONS.items(), *columns, strict=True):
        rows[f"[{question}](#{section})"] = cells
    return TITLES.values(), rows


def summary():
    """The README's"""
    rows = {}
    for name, title in TITLES.items():
        size = sizes()[name]
        rows[title] = [
            size.parameters, size.cache_16384, ratio("step", name, 2048),
            ratio("decode 8", name, 4096), f"{mean_of(best_rate(name)[1]):.3f}",
        ]
    columns = ["parameters", "cache, 16,384 tokens", "training speed", "decoding speed",
               "loss of a small model"]
    return columns, rows


TABLES = (summary, scoreboard, speeds, attention, rates, adamw, factorial, windows,
          convergence, text, samples, stretch, recall, heads, converted, speed)
