"""
Files that others may have written or damaged, changed at random: each is loaded as it was, or
refused with one of our own errors. `python -m pytest -m slow tests/test_fuzz.py`; FUZZ_SEED=7
tries other changes.
"""

import copy
import json
import os
import random
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import HERE, TINY, checkpoint, start
from test_tokenizers import trained

import train
from model import GPT, GPTConfig
from plumbing.checkpoints import load_checkpoint
from plumbing.run_folder import Metrics
from plumbing.token_files import Data, load_meta

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("short_sample")]
SEED = int(os.environ.get("FUZZ_SEED", "1"))
SECONDS = 120   # for each kind of file
MORE_MEMORY = 3 * 2**30   # bytes beyond what the process has at the start; then a MemoryError
HOSTILE = [
    None, True, False, -1, 0, 1, 3, 2**31, 2**63, 10**400, 1e308, -1e-320, float("nan"), "", "x",
    "\ud800", "\0", "../../x", "x" * 10_000, [], {}, [[]], [1, "a"], {"a": {"b": 1}},
]
TENSORS = [
    torch.zeros(0), torch.zeros(()), torch.zeros(1), torch.zeros(3, 3), torch.zeros(2, 3, 4),
    torch.full((48, 16), float("nan")), torch.zeros(48, 16, dtype=torch.float64),
    torch.zeros(48, 16, dtype=torch.int64), torch.zeros(16, 48).T, torch.zeros(48, 16).to_sparse(),
    torch.zeros(1).expand(48, 16), torch.zeros(48, 16, device="meta"),
    torch.zeros(48, 16, dtype=torch.complex64),
]


@pytest.fixture(autouse=True)
def limited_memory():
    """Allocations fail past a limit, which processes that are started inherit."""
    if sys.platform != "linux":
        yield
        return
    import resource  # not on Windows

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + MORE_MEMORY
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (before, hard))


def changed_bytes(raw, rng):
    raw = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 8))):
        place = rng.randrange(len(raw) + 1)
        kind = rng.randrange(5)
        if kind == 0 and raw:
            raw[place % len(raw)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            raw[place:place] = rng.randbytes(rng.choice((1, 4, 100)))
        elif kind == 2:
            del raw[place:place + rng.choice((1, 10, 10_000))]
        elif kind == 3:
            raw[place:place] = raw[:rng.choice((10, 1000))]
        else:
            del raw[place:]
    return bytes(raw)


def changed_values(data, rng, hostile=HOSTILE):
    """A nested dictionary or list with one or two values replaced, removed or doubled"""
    data = copy.deepcopy(data)
    for _ in range(rng.choice((1, 1, 2))):
        inside = data
        while True:
            keys = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
            if not keys:
                break
            key = rng.choice(keys)
            deeper = inside[key]
            if isinstance(deeper, (dict, list)) and deeper and rng.random() < 0.7:
                inside = deeper
                continue
            kind = rng.randrange(8)
            if kind == 0:
                del inside[key]
            elif kind == 1 and isinstance(inside, dict):
                inside[f"{key}x"] = inside.pop(key)
            elif kind == 2 and isinstance(inside, list):
                inside.append(deeper)
            elif kind == 3 and isinstance(deeper, int):
                inside[key] = deeper + rng.choice((-1, 1))
            else:
                inside[key] = copy.deepcopy(rng.choice(hostile))   # later changes go into it
            break
    return data


def fuzz(cases, change, load):
    """
    load() after every change(rng): it must return, or raise an error of ours (ValueError) or of the
    system.
    """
    rng = random.Random(SEED)
    deadline = time.monotonic() + SECONDS
    refused = 0
    for case in range(cases):
        change(rng)
        begun = time.monotonic()
        try:
            load()
        except (ValueError, OSError) as e:
            assert type(e) is not UnicodeDecodeError and len(str(e).splitlines()) <= 1, (case, e)
            refused += 1
        assert time.monotonic() - begun < 20, f"case {case} hangs"
        assert time.monotonic() < deadline, f"only {case} cases in {SECONDS} s"
    assert refused > cases / 10, "the changes are too harmless"


def write_json(path, data):
    Path(path).write_text(json.dumps(data), encoding="utf-8", errors="surrogatepass")


def from_bytes(path):
    """A change of the file at path, always from what it holds now"""
    raw = Path(path).read_bytes()
    return lambda rng: Path(path).write_bytes(changed_bytes(raw, rng))


def from_json(path):
    data = json.loads(Path(path).read_text(encoding="utf-8"))
    return lambda rng: write_json(path, changed_values(data, rng))


@pytest.fixture
def exported():
    """A Hugging Face folder with a tokenizer"""
    model = GPT(GPTConfig(8, 400, 2, 2, 16))
    model.save_pretrained("exported")
    trained().save("exported/tokenizer.json")
    return Path("exported")


@pytest.fixture
def run():
    train.main([*TINY, "--max_iters=6"])
    return Path("out")


@pytest.mark.parametrize("kind", [from_bytes, from_json], ids=["bytes", "values"])
@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neo", "starcoder2"])
def test_config_json(kind, model_type, exported):
    switches = {"gpt2": {}, "gpt_neo": {"use_swa": True, "window_size": (0, 4), "bias": False},
                "starcoder2": {"use_rope": True}}[model_type]
    GPT(GPTConfig(8, 400, 2, 2, 16, **switches)).save_pretrained("exported")
    Path("exported/tokenizer.json").unlink()
    fuzz(120, kind("exported/config.json"), lambda: GPT.from_pretrained("exported"))


@pytest.mark.parametrize("kind", [from_bytes, from_json], ids=["bytes", "values"])
def test_tokenizer_json(kind, exported):
    fuzz(150, kind("exported/tokenizer.json"), lambda: GPT.from_pretrained("exported"))


def test_safetensors(exported):
    Path("exported/tokenizer.json").unlink()
    fuzz(200, from_bytes("exported/model.safetensors"), lambda: GPT.from_pretrained("exported"))


@pytest.mark.parametrize("kind", [from_bytes, from_json], ids=["bytes", "values"])
def test_meta_json(kind):
    def load():
        meta = load_meta("data/tiny")
        x, y = Data(Path("data/tiny"), meta, "train", 8, seed=0).batch(range(4))
        assert x.shape == y.shape == (4, 8)
    fuzz(200, kind("data/tiny/meta.json"), load)


def test_metrics_csv(run):
    rows = []

    def load():
        rows.append(Metrics(Path("out/metrics.csv"), resume_step=5).rows)
        raise ValueError("read")   # there is nothing to refuse
    fuzz(200, from_bytes("out/metrics.csv"), load)
    assert any(rows)


def test_bytes_of_a_checkpoint(run):
    """Whatever loads is what was saved."""
    whole = checkpoint("out/ckpt.pt")

    def load():
        found = load_checkpoint("out/ckpt.pt")
        assert all(torch.equal(found["model"][name], t) for name, t in whole["model"].items())
    fuzz(200, from_bytes("out/ckpt.pt"), load)


@pytest.mark.parametrize("resume", [False, True], ids=["sample", "resume"])
def test_values_of_a_checkpoint(run, resume):
    saved = checkpoint("out/ckpt.pt")
    Path("out/best.pt").unlink()

    def change(rng):
        torch.save(changed_values(saved, rng, HOSTILE + TENSORS), "out/ckpt.pt")

    def load():
        if resume:
            train.main([*TINY, "--max_iters=7", "--init_from=resume", "--eval_interval=100"])
        else:
            GPT.from_pretrained("out")
    fuzz(150, change, load)


def test_config_files(run):
    text = (HERE / "config" / "shakespeare.py").read_text(encoding="utf-8")
    Path("own.py").write_text(text, encoding="utf-8")
    fuzz(200, from_bytes("own.py"), lambda: train.load_config(["own.py"]))


@pytest.mark.parametrize("number", range(10))
def test_whole_commands_end_with_one_line(run, number):
    """In processes of their own: no crash of the interpreter, and at most one line"""
    rng = random.Random(1000 * SEED + number)
    saved = checkpoint("out/ckpt.pt")
    torch.save(changed_values(saved, rng, HOSTILE + TENSORS), "out/best.pt")
    from_bytes("data/tiny/meta.json")(rng)
    for process in (
        start("--out_dir=out", "--max_new_tokens=3", "--device=cpu", script="sample.py"),
        start(*TINY, "--max_iters=7", "--out_dir=new"),
    ):
        out, err = process.communicate(timeout=100)
        assert process.returncode in (0, 1) and "Traceback" not in err, err
        lines = [line for line in err.splitlines() if not line.startswith("device:")]
        assert len(lines) <= 1, err


