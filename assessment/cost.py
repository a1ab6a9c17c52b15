"""What each variant costs: size, compute and cache by formula; time and memory by measurement."""

import statistics
import time
from dataclasses import replace
from typing import NamedTuple

import torch

import train
from assessment.measure import (
    added_mb,
    cpu_only,
    hardware,
    interval,
    machine,
    milliseconds,
    peak_mb,
    print_table,
    print_versions,
    spread,
    step_after_first,
    step_as_trained,
    times,
    times_apart,
    times_as_fast,
    write_results,
)
from model import GPT, GPTConfig, attend, attend_in_blocks, attend_with_flash, flash_fits, visible
from plumbing.device import disable_cudnn_attention
from plumbing.errors import InputError

WINDOW = 256
ROPE = {"use_rope": True}
GQA = {"use_gqa": True, "n_kv_head": 4}
SWA = {"use_swa": True, "window_size": WINDOW}
SWITCHES = {"gpt2": {}, "rope": ROPE, "gqa": GQA, "swa": SWA, "modern": ROPE | GQA | SWA}
BASE = "gpt2"   # what the ratios in the tables compare with

ATTENTION_LENGTHS = (1024, 2048, 4096, 8192, 16384)   # of attention alone
CONTEXTS = (256, 1024, 4096)   # before the tokens that are timed, on a CPU
TOKENS_TIMED = 25           # one more token, so many times ...
ROOM = 2 * TOKENS_TIMED     # ... each after a token that is not counted
TINY_VOCABULARY = 64


# ----------------------------------------------------------------------------------------------
# By formula

def cache_bytes(config, n, itemsize=4):
    """
    What the cache holds after n tokens of one sequence: a key and a value per kept token and layer.
    A model with block_size n, and no window longer than that, allocates exactly this.
    """
    kept = sum(min(n, W) if W else n for W in config.windows)
    key_value_heads = config.n_kv_head or config.n_head
    head_width = config.n_embd // config.n_head
    return 2 * kept * key_value_heads * head_width * itemsize


def fill(model, n, B=1):
    """
    A cache as after n tokens. Keys and values are random: they do not change time or memory.
    AssertionError unless the slots in use hold as many bytes as cache_bytes says.
    """
    cache = model.new_cache(B)
    held = 0
    for layer in cache.layers:
        _, K, _, D = layer.k.shape
        for pos in torch.arange(n, device=layer.k.device).split(512):
            k, v = torch.randn(2, B, K, len(pos), D, device=layer.k.device, dtype=layer.k.dtype)
            layer.write(k, v, pos)
        in_use = layer.pos >= 0
        held += layer.k[:, :, in_use].nbytes + layer.v[:, :, in_use].nbytes
    cache.length = n
    itemsize = model.wte.weight.dtype.itemsize
    assert held == B * cache_bytes(model.config, n, itemsize), "the formula is wrong"
    return cache


class Size(NamedTuple):
    """In words"""
    parameters: str
    flops_1024: str
    flops_16384: str
    cache_1024: str
    cache_16384: str


SIZE_COLUMNS = ("parameters", "training FLOPs per token, T = 1,024", "T = 16,384",
                "cache, 1,024 tokens", "16,384")


def size_of(config):
    with torch.device("meta"):
        model = GPT(config)
    return Size(
        f"{model.num_params() / 1e6:.2f}M",
        f"{model.flops_per_token(1024) / 1e6:,.0f}M",
        f"{model.flops_per_token(16384) / 1e6:,.0f}M",
        f"{cache_bytes(config, 1024) / 1e6:,.1f} MB",
        f"{cache_bytes(config, 16384) / 1e6:,.1f} MB",
    )


def print_formulas(configs):
    title = (
        "By formula; GPT-2 124M, unless a file says otherwise (tests compare parameters and FLOPs "
        "with PyTorch's own counts; cache in float32, batch 1)"
    )
    print_table(title, SIZE_COLUMNS, {name: size_of(config) for name, config in configs.items()})


# ----------------------------------------------------------------------------------------------
# Whole models, by measurement: {(what, T): {variant: list of seconds or MB}}

def measure_training(configs, T, device, bf16):
    """A training step of one sequence: seconds, and MB above parameters and optimizer state"""
    memory = {}
    steps = {}
    for name, config in configs.items():
        config = replace(config, block_size=T)
        memory[name] = [added_mb(step_after_first, config, T, device, bf16)]
        steps[name] = step_as_trained, config, 1, T, device, bf16
    return {("step", T): times_apart(steps, repeat=9), ("memory", T): memory}


@torch.no_grad()
def measure_inference(configs, n, batch_sizes, device):
    """
    A prompt of n tokens, and one more token after n, for each batch size; in bfloat16 on CUDA
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    models = {}
    for name, config in configs.items():
        longer = replace(config, block_size=n + ROOM)
        models[name] = GPT(longer).to(device, dtype).eval()

    def prefill(model):
        return lambda: model.hidden(prompt, model.new_cache(1))

    def one_more(model, B):
        cache = fill(model, n, B)
        token = torch.zeros(B, 1, dtype=torch.long, device=device)
        return lambda: model(token, cache=cache)

    prompt = torch.randint(TINY_VOCABULARY, (1, n), device=device)
    prompts = {name: prefill(model) for name, model in models.items()}
    measured = {("prefill", n): times(prompts, repeat=9)}
    for B in batch_sizes:
        what = "decode" if B == 1 else f"decode {B}"
        tokens = {name: one_more(model, B) for name, model in models.items()}
        measured[what, n] = times(tokens, TOKENS_TIMED)
    return measured


def measure_models(configs, device, bf16, tiny):
    """-> the measurements, and which model they were made with"""
    if tiny:
        T, contexts = 32, (16, 32)
        size = "one block, heads of 16"
        configs = {name: tiny_model(config) for name, config in configs.items()}
    elif device.type == "cuda":
        T, contexts = 4096, (256, 1024, 4096, 16384, 32768)
        size = "GPT-2 124M"
    else:
        T, contexts = 2048, CONTEXTS
        size = "four blocks of GPT-2, vocabulary 4,096"
        configs = {name: four_blocks(config) for name, config in configs.items()}
    measured = measure_training(configs, T, device, bf16)
    disable_cudnn_attention()   # as sample.py does
    for n in contexts:
        batch_sizes = (1, 8) if n == 4096 else (1,)
        measured |= measure_inference(configs, n, batch_sizes, device)
    return measured, size


def four_blocks(config):
    return replace(config, n_layer=4, vocab_size=4096, window_size=first_windows(config, 4))


def tiny_model(config):
    return replace(config, n_layer=1, n_embd=16 * config.n_head, vocab_size=TINY_VOCABULARY,
                   window_size=first_windows(config, 1))


def first_windows(config, n):
    """The window_size of the first n layers, from the beginning again if there are fewer"""
    if not isinstance(config.window_size, tuple):
        return config.window_size
    return (n * config.window_size)[:n]


def heading(what, n):
    return {
        "step": f"training, T = {n:,}",
        "memory": "memory of a step",
        "prefill": f"prompt of {n:,}",
        "decode": f"decoding after {n:,}",
        "decode 8": f"after {n:,}, batch 8",
    }[what]


def cell(what, n, values, base):
    """The ratio to base, then MB or tokens/s"""
    if what == "memory":
        return f"{values[0] / base[0]:.2f}: {values[0]:,.0f} MB"
    tokens = {"decode": 1, "decode 8": 8}.get(what, n)
    speeds = [tokens / seconds for seconds in values]
    mean, half = paired_ratio(values, base)
    return f"{mean:.2f} ± {half:.2f}: {spread(speeds, ',.0f')}"


def paired_ratio(seconds, base):
    """How many times as fast as base, by round of times: the mean, and half of its 95% interval"""
    return interval([theirs / ours for ours, theirs in zip(seconds, base, strict=True)])


def print_measured(measured, size, bf16):
    dtype = "bfloat16" if bf16 else "float32"
    title = (
        f"ratio to {BASE}: tokens/s (smallest to largest), {size}; training in {dtype}, batch 1, "
        "the rest in float32 (on CUDA all in bfloat16, and training compiled); memory above "
        "parameters and optimizer state"
    )
    reading = {key: runs for key, runs in measured.items() if not key[0].startswith("decode")}
    decoding = {key: runs for key, runs in measured.items() if key[0].startswith("decode")}
    for part in (reading, decoding):
        columns = []
        rows = {}
        for (what, n), runs in part.items():
            columns.append(heading(what, n))
            for name, values in runs.items():
                rows.setdefault(name, []).append(cell(what, n, values, runs[BASE]))
        print_table(title, columns, rows)


# ----------------------------------------------------------------------------------------------
# Attention alone

def full(q, k, v):
    return attend(q, k, v, causal=True)


def masked(q, k, v):
    pos = torch.arange(q.shape[2], device=q.device)
    return attend(q, k, v, visible(pos, pos, WINDOW))


def blocks(q, k, v):
    """What a model with a window does"""
    if flash_fits(q, dropout=0.0):
        return attend_with_flash(q, k, v, WINDOW)
    return attend_in_blocks(q, k, v, WINDOW)


FORMS = {"full": full, "masked": masked, "blocks": blocks}
H, D = 12, 64   # heads and their width, as in GPT-2 124M


def random_heads(T):
    """q, k and v side by side, in memory as c_attn leaves them: (1,3H,T,D); on CUDA in bfloat16"""
    if torch.cuda.is_available():
        heads = torch.randn(1, T, 3 * H, D, device="cuda", dtype=torch.bfloat16)
    else:
        heads = torch.randn(1, T, 3 * H, D)
    return heads.transpose(1, 2)


def forward_only(form, T):
    disable_cudnn_attention()   # as train.py and sample.py do
    heads = random_heads(T)

    def run():
        with torch.no_grad():
            FORMS[form](*heads.split(H, dim=1))
    return run


def forward_and_backward(form, T):
    disable_cudnn_attention()
    heads = random_heads(T).requires_grad_()
    gradient = torch.ones_like(heads[:, :H])

    def run():
        FORMS[form](*heads.split(H, dim=1)).backward(gradient)
    return run


def measure_attention(T):
    """-> {(what, T): {form: list of seconds or MB}}"""
    forms = list(FORMS)
    if T >= 16384:
        forms.remove("masked")   # the mask alone takes 1 GB there, in float32
    if T < 4096:
        repeat = 9
    elif T < 8192:
        repeat = 3
    else:
        repeat = 2
    memory = {form: [added_mb(forward_and_backward, form, T)] for form in forms}
    return {
        ("attention forward", T): times({f: forward_only(f, T) for f in forms}, repeat),
        ("attention", T): times({f: forward_and_backward(f, T) for f in forms}, repeat),
        ("attention memory", T): memory,
    }


def attention(lengths=ATTENTION_LENGTHS):
    """Time and memory of full, masked and blocked attention by the length of the text"""
    measured = {}
    rows = {}
    for T in lengths:
        measured |= measure_attention(T)
        forward = measured["attention forward", T]
        both = measured["attention", T]
        memory = measured["attention memory", T]
        cells = []
        for form in FORMS:
            if form in both:
                forward_ms = 1e3 * statistics.median(forward[form])
                mb = memory[form][0]
                cells.append(f"{forward_ms:,.0f}, {milliseconds(both[form])}, {mb:.0f} MB")
            else:
                cells.append("-")
        faster = [f"{times_as_fast(run['blocks'], run['full']):.1f}" for run in (forward, both)]
        rows[f"{T:,}"] = [*cells, ", ".join(faster)]
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    title = (
        f"Attention, {H} heads of {D}, W = {WINDOW}, {dtype}: ms forward, ms forward and backward, "
        "memory of both"
    )
    print_table(title, ["full", "masked", "in blocks", "full / blocks"], rows)
    return measured


# ----------------------------------------------------------------------------------------------
# Without end

def endless(n=100_000):
    """Speed and memory of a model with RoPE and a window in every layer, as the text grows"""
    torch.manual_seed(0)
    config = GPTConfig(
        block_size=256, vocab_size=256, n_layer=4, n_head=4, n_embd=128,
        use_rope=True, use_swa=True, window_size=64,
    )
    model = GPT(config).eval()
    start = time.perf_counter()
    prompt = torch.zeros(1, 1, dtype=torch.long)
    for i, _ in enumerate(model.stream(prompt, n), 1):
        if i in (1000, n // 10) or i % (n // 4) == 0:
            speed = i / (time.perf_counter() - start)
            print(f"{i:8,} tokens, {speed:6.0f} tokens/s, peak memory {peak_mb():.1f} MB")


# ----------------------------------------------------------------------------------------------
# The commands

def write_csv(measured, line):
    rows = []
    for (what, T), runs in measured.items():
        for name, values in runs.items():
            numbers = statistics.median(values), min(values), max(values)
            row = [what, name, T, *(f"{x:.6g}" for x in numbers), "", ""]
            if BASE in runs and len(values) > 1:   # not of memory, nor of attention alone
                row[-2:] = [f"{x:.4f}" for x in paired_ratio(values, runs[BASE])]
            rows.append(row)
    write_results(
        "variants.csv",
        ("what", "variant", "T", "median", "low", "high", "times_as_fast", "half"), rows,
        f"torch {torch.__version__}; {hardware()}; {line}",
        "seconds and, for memory, MB; times_as_fast: as gpt2, ± half, a 95% interval",
    )


def variants(files, keep, tiny):
    """
    Tables of all variants and of the models in these config files.
    keep: write variants.csv. tiny: of a tiny model, to see that it works
    """
    device, bf16, line = machine()
    print(line)
    configs = {name: GPTConfig(**switches) for name, switches in SWITCHES.items()}
    for file in files:
        configs[file] = train.load_config([file])[1]
    print_formulas(configs)
    measured, size = measure_models(configs, device, bf16, tiny)
    print_measured(measured, size, bf16)
    measured |= attention([64] if tiny else ATTENTION_LENGTHS)
    if keep:
        write_csv(measured, line)


def main(argv):
    if argv == ["attention"]:
        print_versions()
        attention()
        return
    if argv == ["endless"]:
        print_versions()
        cpu_only()
        endless()
        return
    files = [word for word in argv if word not in ("--csv", "--tiny")]
    for file in files:
        if not file.endswith(".py"):
            raise InputError(
                f"cost {' '.join(argv)}: {file} is no config file (.py); cost takes config files "
                "and --csv or --tiny, or attention or endless by itself"
            )
    keep, tiny = "--csv" in argv, "--tiny" in argv
    if keep and tiny:
        raise InputError("cost: --csv keeps figures, and those of --tiny mean nothing")
    if keep and torch.cuda.is_available():
        raise InputError("cost --csv keeps the figures of a CPU, for the pages; those of a GPU are "
                         "kept by python -m assessment gpu")
    print_versions()
    variants(files, keep, tiny)
