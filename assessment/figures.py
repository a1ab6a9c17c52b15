"""
The figures in the pages, from results/*.csv: the tables between <!-- table NAME --> and
<!-- end -->, and the decimal numbers in the assessment's sentences, each of which must stand in one
of its tables or in CITED.
"""

import functools
import re
import statistics
from pathlib import Path

import torch

from assessment.claims import ADAMW_RATES, PARTS, RATES
from assessment.cost import VARIANTS, cache_bytes
from assessment.measure import ROOT, read_results
from assessment.small_models import LENGTHS, REPEATED
from assessment.stretch import METHODS
from model import GPT, GPTConfig
from plumbing.errors import InputError
from plumbing.files import replacing

ASSESSMENT = ROOT / "assessment" / "README.md"
NAMES = {"gpt2": "gpt2", "rope": "rope", "gqa": "gqa", "swa": "swa", "modern": "all three"}

# Numbers in sentences that no table of ours holds, and where they come from
CITED = {
    "2.13": "the version of torch",
    "0.8": "the temperature, and millions of parameters",
    "2.759": "EleutherAI's blog on rotary embeddings, 125M parameters",
    "2.809": "the same, learned positions",
    "1.24": "Longformer, table 4, shrinking windows",
    "1.23": "Longformer, table 4, equal windows",
    "1.21": "Longformer, table 4, growing windows",
}

# ----------------------------------------------------------------------------------------------
# Paired differences

T_95 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}   # two-sided, by df


def values_of(rows, part, variant, measure="loss", step=None, length=None):
    """{seed: value}; without a step, of the last one"""
    found = {}
    lengths = set()
    for row in rows:
        if (row["part"], row["variant"], row["measure"]) != (part, variant, measure):
            continue
        if length in (None, int(row["length"])) and step in (None, int(row["step"])):
            lengths.add(row["length"])
            found.setdefault(int(row["step"]), {})[int(row["seed"])] = float(row["value"])
    if len(lengths) != 1:
        raise InputError(f"claims.csv: {part}, {variant}, {measure} at {len(lengths)} lengths")
    return found[max(found)]


def difference(new, old):
    """{seed: value} twice -> mean of new - old over the seeds, and half of its 95% interval"""
    if new.keys() != old.keys():
        raise InputError(f"claims.csv: seeds {sorted(new)} cannot be paired with {sorted(old)}")
    differences = [new[seed] - old[seed] for seed in new]
    n = len(differences)
    half = T_95[n - 1] * statistics.stdev(differences) / n ** 0.5
    return statistics.mean(differences), half


def in_words(mean, half, spec=".3f"):
    """'-0.139 ± 0.016', with a warning if the interval holds 0"""
    text = f"{mean:+{spec}} ± {half:{spec}}"
    return f"{text}, not resolved" if abs(mean) <= half else text


def against(new, old, **kind):
    return in_words(*difference(new, old), **kind)


def mean_of(values):
    return statistics.mean(values.values())


# ----------------------------------------------------------------------------------------------
# The tables: functions without arguments -> (columns, {name of a row: cells})

@functools.cache
def rows_of(name):
    return read_results(name)


def claims(*args, **kwargs):
    return values_of(rows_of("claims.csv"), *args, **kwargs)


def ratio(what, variant, T):
    """gpt2's seconds / the variant's; for memory, the variant's MB / gpt2's. From variants.csv"""
    found = {row["variant"]: float(row["median"]) for row in rows_of("variants.csv")
             if (row["what"], row["T"]) == (what, str(T))}
    return found[variant] / found["gpt2"] if what == "memory" else found["gpt2"] / found[variant]


def sizes():
    """{variant: (parameters, FLOPs per token at 1,024, at 16,384, MB of cache at these)}"""
    found = {}
    for name, switches in VARIANTS.items():
        config = GPTConfig(**switches)
        with torch.device("meta"):
            model = GPT(config)
        found[name] = (
            f"{model.num_params() / 1e6:.2f}M",
            *(f"{model.flops_per_token(T) / 1e6:,.0f}M" for T in (1024, 16384)),
            *(f"{cache_bytes(config, T) / 1e6:,.1f} MB" for T in (1024, 16384)),
        )
    return found


def best_rate(variant, optimizer="muon"):
    """The learning rate with the lowest mean loss, and {seed: loss} there"""
    tried = RATES if optimizer == "muon" else ADAMW_RATES
    losses = {rate: claims("rates", f"{variant} {optimizer} {rate}") for rate in tried}
    rate = min(tried, key=lambda rate: mean_of(losses[rate]))
    return rate, losses[rate]


def scoreboard():
    size = sizes()
    _, base_loss = best_rate("gpt2")
    rows = {}

    def row(title, anchor, cells):
        rows[f"[{title}](#{anchor})"] = cells

    def compared(of, base, **kind):
        return [base, *(against(of(name), of("gpt2"), **kind) for name in list(VARIANTS)[1:])]

    def each(cell):
        return [cell(name) for name in VARIANTS]

    row("Size", "size-compute-memory", each(lambda v: size[v][0]))
    row("Compute: FLOPs per token, T = 16,384", "size-compute-memory", each(lambda v: size[v][2]))
    row("Memory: cache of 16,384 tokens; training step", "size-compute-memory",
        each(lambda v: f"{size[v][4]}; {ratio('memory', v, 2048):.2f}"))
    row("Performance: training; decoding", "speed",
        each(lambda v: f"{ratio('step', v, 2048):.2f}; {ratio('decode 8', v, 4096):.2f}"))
    row("Loss after 300 steps", "loss-each-at-its-best-learning-rate",
        compared(lambda v: best_rate(v)[1], f"{mean_of(base_loss):.3f}"))
    row("Convergence: loss after 900", "convergence",
        compared(lambda v: claims("text", v), f"{mean_of(claims('text', 'gpt2')):.3f}"))
    row("Text: real words", "quality-of-generated-text",
        compared(lambda v: percent(claims("text", v, "real words")),
                 f"{mean_of(percent(claims('text', 'gpt2', 'real words'))):.1f}%", spec=".1f"))
    row("Long range: recalls 25 back", "long-range",
        each(lambda v: f"{mean_of(recalled(v, 25)):.0f}%"))
    row("Pitfall", "challenges-and-pitfalls", PITFALLS)
    row("Challenge", "challenges-and-pitfalls", CHALLENGES)
    return NAMES.values(), rows


PITFALLS = ["ends at its last position", "fails past the trained length",
            "converted weights need training", "what is out of sight is gone",
            "all of these but the second"]
CHALLENGES = ["exact GELU and layouts", "float32 angles, once per key", "which heads share",
              "linear time; a ring of keys", "positions in a ring"]


def percent(values):
    return {seed: 100 * value for seed, value in values.items()}


def recalled(variant, distance):
    """{seed: percent}"""
    return percent(claims("recall", variant, "recall", length=distance))


def formulas():
    columns = ["parameters", "training FLOPs per token, T = 1,024", "T = 16,384",
               "cache, 1,024 tokens", "16,384"]
    return columns, {NAMES[name]: cells for name, cells in sizes().items()}


MEASURED = (("step", 2048), ("memory", 2048), ("prefill", 1024), ("prefill", 4096),
            ("decode", 256), ("decode", 1024), ("decode", 4096), ("decode 8", 4096))


def speeds():
    columns = ["training, T = 2,048", "memory of a step", "prompt of 1,024", "4,096",
               "one token after 256", "1,024", "4,096", "4,096, batch 8"]
    rows = {}
    for name in VARIANTS:
        rows[NAMES[name]] = [f"{ratio(what, name, T):.2f}" for what, T in MEASURED]
    return columns, rows


def attention():
    """Full attention's milliseconds, and how many times as fast blocks are; forward, and both"""
    found = {}
    for row in rows_of("variants.csv"):
        found[row["what"], row["variant"], int(row["T"])] = float(row["median"])
    columns = [f"{T:,}" for T in (1024, 2048, 4096, 8192, 16384)]
    rows = {"full / blocks, forward": [], "forward and backward": [], "memory, blocks / full": []}
    for T in (1024, 2048, 4096, 8192, 16384):
        for cells, what in zip(rows.values(), ("attention forward", "attention"), strict=False):
            cells.append(f"{found[what, 'full', T] / found[what, 'blocks', T]:.1f}")
        memory = [found["attention memory", form, T] for form in ("blocks", "full")]
        rows["memory, blocks / full"].append(f"{memory[0] / memory[1]:.2f}")
    return columns, rows




def rates():
    rows = {}
    for name, title in NAMES.items():
        cells = [f"{mean_of(claims('rates', f'{name} muon {rate}')):.3f}" for rate in RATES]
        rate, losses = best_rate(name)
        cells.append("" if name == "gpt2" else against(losses, best_rate("gpt2")[1]))
        cells[RATES.index(rate)] = f"**{cells[RATES.index(rate)]}**"
        rows[title] = cells
    return [*RATES, "best minus gpt2's best"], rows


def adamw():
    rows = {}
    for name in ("gpt2", "rope"):
        means = [mean_of(claims("rates", f"{name} adamw {rate}")) for rate in ADAMW_RATES]
        cells = [f"{mean:.3f}" for mean in means]
        rate, losses = best_rate(name, "adamw")
        cells[ADAMW_RATES.index(rate)] = f"**{cells[ADAMW_RATES.index(rate)]}**"
        compared = "" if name == "gpt2" else against(losses, best_rate("gpt2", "adamw")[1])
        rows[name] = [*cells, compared]
    return [*ADAMW_RATES, "best minus gpt2's best"], rows


def factorial():
    rows = {}
    base = claims("factorial", "gpt2")
    for name in ("gpt2", "rope", "gqa", "swa", "rope+gqa", "rope+swa", "gqa+swa", "rope+gqa+swa"):
        losses = claims("factorial", name)
        seconds = mean_of(claims("factorial", "gpt2", "seconds"))
        faster = seconds / mean_of(claims("factorial", name, "seconds"))
        compared = "" if name == "gpt2" else against(losses, base)
        title = "all three" if name == "rope+gqa+swa" else name
        rows[title] = [f"{mean_of(losses):.3f}", compared, f"{faster:.2f}"]
    return ["loss", "minus gpt2's", "speed"], rows


def convergence():
    rows = {}
    last = mean_of(claims("text", "gpt2"))
    for name, title in NAMES.items():
        means = {step: mean_of(claims("text", name, step=step)) for step in range(100, 901, 100)}
        cells = [f"{means[step]:.3f}" for step in (100, 300, 900)]
        for step in (300, 900):
            losses, base = [claims("text", variant, step=step) for variant in (name, "gpt2")]
            cells.append("" if name == "gpt2" else against(losses, base))
        reached = [str(step) for step in means if means[step] <= last]
        rows[title] = [*cells, reached[0] if reached else "not in 900"]
    columns = ["100 steps", "300", "900", "at 300, minus gpt2's", "at 900, minus gpt2's",
               "reaches gpt2's last loss at step"]
    return columns, rows


def stretch():
    rows = {}
    for method in METHODS:
        cells = []
        for step in (300, 330):
            for T in LENGTHS:
                cells.append(f"{mean_of(claims('stretch', 'rope', method, step, T)):.2f}")
        rows[method] = cells
    return [f"{T:,}" for T in LENGTHS] + [f"{T:,}, trained" for T in LENGTHS], rows


def recall():
    rows = {}
    for variant in PARTS["recall"].variants:
        cells = []
        for n in REPEATED:
            shares = recalled(variant, n + 1).values()
            cells.append(f"{statistics.mean(shares):.0f}% ({min(shares):.0f} to {max(shares):.0f})")
        title = NAMES.get(variant, variant)
        rows[title] = [*cells, f"{mean_of(claims('recall', variant)):.3f}"]
    return [f"{n + 1} back" for n in REPEATED] + ["loss"], rows


def heads():
    base = claims("heads", "8 heads")
    rows = {}
    for n in (8, 4, 2, 1):
        losses = claims("heads", f"{n} heads")
        rows[f"{n} of 8"] = [f"{mean_of(losses):.3f}", "" if n == 8 else against(losses, base)]
    return ["loss", "minus 8 heads'"], rows


CONVERTED_STEPS = (0, 15, 30, 75, 150)


def converted():
    rows = {}
    names = {"mean of 4": "2 heads, the mean", "first of 4": "2 heads, the first",
             "mean of 8": "1 head, the mean", "first of 8": "1 head, the first",
             "not converted": "8 heads, not converted"}
    for measure, title in names.items():
        found = [claims("heads", "8 heads", measure, step) for step in CONVERTED_STEPS]
        cells = [f"{mean_of(values):.3f}" for values in found]
        last = claims("heads", "8 heads", "not converted", 150)
        cells.append("" if measure == "not converted" else against(found[-1], last))
        rows[title] = cells
    return ["at once", "5%", "10%", "25%", "50%", "at 50%, minus not converted"], rows


def windows():
    full = claims("rates", "gpt2 muon 1.5e-2")
    found = {
        "full": full,
        "32 in every layer": claims("rates", "swa muon 1.5e-2"),
        "8 in every layer": claims("windows", "8"),
        "8 24 40 56": claims("windows", "growing"),
        "56 40 24 8": claims("windows", "shrinking"),
    }
    rows = {}
    for name, losses in found.items():
        compared = "" if name == "full" else against(losses, full)
        rows[name] = [f"{mean_of(losses):.3f}", compared]
    return ["loss", "minus full attention's"], rows


def text():
    measures = ("real words", "repetition", "distinct-4")
    base = {measure: percent(claims("text", "gpt2", measure)) for measure in measures}
    rows = {}
    for name, title in NAMES.items():
        cells = []
        for measure in measures:
            values = percent(claims("text", name, measure))
            cell = f"{mean_of(values):.1f}%"
            if name != "gpt2":
                cell += f" ({against(values, base[measure], spec='.1f')})"
            cells.append(cell)
        rows[title] = cells
    human = [percent(claims("text", "gpt2", f"{measure}, Shakespeare")) for measure in measures]
    rows["Shakespeare"] = [f"{mean_of(values):.1f}%" for values in human]
    return measures, rows


def speed():
    """Ours beside the others', from speed.csv"""
    found = {}
    for row in rows_of("speed.csv"):
        found.setdefault(row["work"], {})[row["who"]] = row
    rows = {}
    for work, runs in found.items():
        if "plainGPT" not in runs or len(runs) < 2:
            continue
        (_, ours), (who, theirs), *_ = runs.items()
        values = [float(ours["median"]), float(theirs["median"])]
        better = values[0] / values[1] if ours["unit"] == "tokens/s" else values[1] / values[0]
        cells = []
        for name, row in list(runs.items())[:2]:
            cells.append(f"{name.split()[0]}: {float(row['median']):,.4g} {row['unit']}")
        rows[work] = [*cells, f"{better:.2f}"]
    return ["", "beside", "times as good"], rows


def summary():
    """The README's"""
    rows = {}
    for (name, title), size in zip(NAMES.items(), sizes().values(), strict=True):
        rows[title] = [
            size[0], size[4], f"{ratio('step', name, 2048):.2f}",
            f"{ratio('decode 8', name, 4096):.2f}", f"{mean_of(best_rate(name)[1]):.3f}",
        ]
    columns = ["parameters", "cache, 16,384 tokens", "training speed", "decoding speed",
               "loss of a small model"]
    return columns, rows


TABLES = (summary, scoreboard, formulas, speeds, attention, rates, adamw, factorial, convergence,
          stretch, recall, heads, converted, windows, text, speed)


# ----------------------------------------------------------------------------------------------
# The pages

MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
DECIMAL = re.compile(r"(?<![\w.])\d[\d,]*\.\d+(?![\d.]*\w)")


def markdown(columns, rows):
    lines = [f"| | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    return "\n".join(lines) + "\n"


def renewed(page):
    """The text of a page, each table as the CSV files have it"""
    tables = {table.__name__: table for table in TABLES}
    
    def fill(found):
        return f"{found[1]}\n{markdown(*tables[found[2]]())}\n{found[3]}"
    return MARKED.sub(fill, page)


def strangers(page):
    """The decimal numbers of a page's sentences that stand in none of its tables"""
    tables = "".join(found[0] for found in MARKED.finditer(page))
    known = set(DECIMAL.findall(tables)) | CITED.keys()
    sentences = re.sub(r"`[^`]*`|\]\([^)]*\)", "", MARKED.sub("", page))
    return [number for number in DECIMAL.findall(sentences) if number not in known]


def in_lessons():
    """{page: words that it must contain}"""
    columns, rows = attention()
    faster = dict(zip(columns, rows["forward and backward"], strict=True))
    return {
        "3_rope.md": f"{ratio('memory', 'rope', 2048):.2f} times the memory",
        "5_windows.md": f"{faster['1,024']} times at 1,024 tokens, {faster['4,096']} at 4,096 and "
                        f"{faster['16,384']} at 16,384",
    }


def differences():
    """A line for every figure in the pages that is not as in the CSV files"""
    found = []
    marked = []
    for page in (ROOT / "README.md", ASSESSMENT):
        text = page.read_text(encoding="utf-8")
        for old, new in zip(MARKED.finditer(text), MARKED.finditer(renewed(text)), strict=True):
            marked.append(old[2])
            if old[0] != new[0]:
                found.append(f"{page.name}: table {old[2]}")
    for table in TABLES:
        times = marked.count(table.__name__)
        if times != 1:
            found.append(f"table {table.__name__} stands {times} times in the pages")
    for number in strangers(ASSESSMENT.read_text(encoding="utf-8")):
        found.append(f"{ASSESSMENT.name}: {number} stands in no table")
    for name, words in in_lessons().items():
        text = Path(ROOT, "lessons", name).read_text(encoding="utf-8")
        if words not in " ".join(text.split()):
            found.append(f"{name}: does not say {words!r}")
    return found


def main(argv):
    if argv not in ([], ["--write"]):
        raise InputError(f"figures takes --write or nothing, found {' '.join(argv)}")
    if argv:
        for page in (ROOT / "README.md", ASSESSMENT):
            text = renewed(page.read_text(encoding="utf-8"))
            with replacing(page) as f:
                f.write(text.encode())
    found = differences()
    if found:
        raise InputError("figures in the pages differ from results/*.csv: " + "; ".join(found))
    print("every figure in the pages is as in results/*.csv")
