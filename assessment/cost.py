"""What each variant costs: size, compute and cache by formula; time and memory by measurement."""

import statistics
import time
from dataclasses import replace

import torch

import train
from assessment.measure import (
    RESULTS,
    Apart,
    added_mb,
    cpu_only,
    hardware,
    machine,
    milliseconds,
    peak_mb,
    print_table,
    print_versions,
    spread,
    step_after_first,
    step_as_trained,
    times,
    times_as_fast,
)
from model import GPT, GPTConfig, attend, attend_in_blocks, attend_with_flash, flash_fits, visible
from plumbing.device import disable_cudnn_attention
from plumbing.errors import InputError

WINDOW = 256
ROPE = {"use_rope": True}
GQA = {"use_gqa": True, "n_kv_head": 4}
SWA = {"use_swa": True, "window_size": WINDOW}
VARIANTS = {"gpt2": {}, "rope": ROPE, "gqa": GQA, "swa": SWA, "modern": ROPE | GQA | SWA}
BASE = "gpt2"   # what the ratios in the tables compare with

LENGTHS = (1024, 2048, 4096, 8192, 16384)   # of attention alone


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


def print_formulas(configs):
    rows = {}
    for name, config in configs.items():
        with torch.device("meta"):
            model = GPT(config)
        rows[name] = [
            f"{model.num_params() / 1e6:.2f}M",
            f"{model.flops_per_token(1024) / 1e6:,.0f}M",
            f"{model.flops_per_token(16384) / 1e6:,.0f}M",
            f"{cache_bytes(config, 1):,}",
            f"{cache_bytes(config, 1024) / 1e6:.1f} MB",
            f"{cache_bytes(config, 16384) / 1e6:.1f} MB",
        ]
    columns = [
        "parameters",
        "training FLOPs per token, T = 1,024",
        "T = 16,384",
        "cache bytes per token",
        "cache of 1,024 tokens",
        "of 16,384",
    ]
    title = (
        "GPT-2 124M, by formula (tests compare parameters and FLOPs with PyTorch's own counts; "
        "cache in float32, batch 1)"
    )
    print_table(title, columns, rows)


# ----------------------------------------------------------------------------------------------
# Whole models, by measurement: {(what, T): {variant: list of seconds or MB}}

def measure_training(configs, T, device, bf16):
    """A training step of one sequence: seconds, and MB above parameters and optimizer state"""
    steps = {name: Apart(step_as_trained, c, 1, T, device, bf16) for name, c in configs.items()}
    seconds = times(steps, repeat=5)
    memory = {}
    for name, config in configs.items():
        memory[name] = [added_mb(step_after_first, config, T, device, bf16)]
    return {("step", T): seconds, ("memory", T): memory}


@torch.no_grad()
def measure_inference(configs, n, batch_sizes, device):
    """
    A prompt of n tokens, and one more token after n, for each batch size; in bfloat16 on CUDA
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    models = {}
    for name, config in configs.items():
        longer = replace(config, block_size=n + 64)   # room for the tokens that are decoded, too
        models[name] = GPT(longer).to(device, dtype).eval()

    def prefill(model):
        return lambda: model.hidden(prompt, model.new_cache(1))

    def one_more(model, B):
        cache = fill(model, n, B)
        token = torch.zeros(B, 1, dtype=torch.long, device=device)
        return lambda: model(token, cache=cache)

    prompt = torch.randint(64, (1, n), device=device)
    prompts = {name: prefill(model) for name, model in models.items()}
    measured = {("prefill", n): times(prompts, repeat=3)}
    for B in batch_sizes:
        what = "decode" if B == 1 else f"decode {B}"
        tokens = {name: one_more(model, B) for name, model in models.items()}
        measured[what, n] = times(tokens, repeat=25)
    return measured


def measure_models(configs, device, bf16, tiny):
    """-> the measurements, and which model they were made with"""
    if tiny:
        T, contexts = 32, (16, 32)
        size = "one block of 48 channels"
        configs = {
            name: replace(c, n_layer=1, n_embd=48, vocab_size=64) for name, c in configs.items()
        }
    elif device.type == "cuda":
        T, contexts = 4096, (256, 1024, 4096, 16384, 32768)
        size = "GPT-2 124M"
    else:
        T, contexts = 2048, (256, 1024, 4096)
        size = "four blocks of GPT-2, vocabulary 4,096"
        configs = {name: four_blocks(config) for name, config in configs.items()}
    configs = {name: replace(c, block_size=max(contexts) + 64) for name, c in configs.items()}
    measured = measure_training(configs, T, device, bf16)
    torch.backends.cuda.enable_flash_sdp(True)
    disable_cudnn_attention()   # as sample.py does
    for n in contexts:
        batch_sizes = (1, 8) if n == 4096 else (1,)
        measured |= measure_inference(configs, n, batch_sizes, device)
    return measured, size


def four_blocks(config):
    window_size = config.window_size
    if isinstance(window_size, tuple):
        window_size = window_size[:4]
    return replace(config, n_layer=4, vocab_size=4096, window_size=window_size)


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
        return f"{1 / times_as_fast(values, base):.2f}: {values[0]:,.0f} MB"
    tokens = {"decode": 1, "decode 8": 8}.get(what, n)
    speeds = [tokens / seconds for seconds in values]
    return f"{times_as_fast(values, base):.2f}: {spread(speeds, ',.0f')}"


def print_measured(measured, size, bf16):
    dtype = "bfloat16" if bf16 else "float32"
    title = (
        f"ratio to {BASE}: tokens/s (smallest to largest), {size}; training in {dtype}, batch 1, "
        "the rest in float32 (on CUDA all in bfloat16, and training compiled); memory above "
        "parameters and optimizer state"
    )
    for decoding in (False, True):
        columns = []
        rows = {}
        for (what, n), runs in measured.items():
            if what.startswith("decode") == decoding:
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
    heads = random_heads(T)

    def run():
        with torch.no_grad():
            FORMS[form](*heads.split(H, dim=1))
    return run


def forward_and_backward(form, T):
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


def attention(lengths=LENGTHS):
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
    title = (
        f"Attention, {H} heads of {D}, W = {WINDOW}, float32: ms forward, ms forward and backward, "
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
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / "variants.csv", "w", encoding="utf-8", newline="\n") as f:
        print(f"# torch {torch.__version__}; {hardware()}; {line}", file=f)
        print("# seconds and, for memory, MB", file=f)
        print("what,variant,T,median,low,high", file=f)
        for (what, T), runs in measured.items():
            for name, values in runs.items():
                numbers = statistics.median(values), min(values), max(values)
                print(what, name, T, *(f"{x:.6g}" for x in numbers), sep=",", file=f)


def variants(files, keep, tiny):
    """
    Tables of all variants and of the models in these config files.
    keep: write variants.csv. tiny: of a tiny model, to see that it works
    """
    device, bf16, line = machine()
    print(line)
    configs = {name: GPTConfig(**switches) for name, switches in VARIANTS.items()}
    for file in files:
        configs[file] = train.load_config([file])[1]
    print_formulas(configs)
    measured, size = measure_models(configs, device, bf16, tiny)
    print_measured(measured, size, bf16)
    measured |= attention([64] if tiny else LENGTHS)
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
    print_versions()
    variants(files, keep="--csv" in argv, tiny="--tiny" in argv)
