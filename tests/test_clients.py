"""
Other people's programs, on folders that save_pretrained writes: `python -m pytest -m slow
tests/test_clients.py`, after `pip install "lm-eval[hf]" ctranslate2 llama-cpp-python gguf`, and
with the path of a checkout of llama.cpp in LLAMA_CPP. Where one is missing, its tests are skipped.
"""

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from helpers import SHAKESPEARE_TEXT, TINY, needs_shakespeare
from torch.nn import functional as F

import train
from model import GPT, GPTConfig
from plumbing.tokenizer import Tokenizer
from prepare_data import prepare_text

PROMPT = "To be, or not to be"
UNICODE = f"{PROMPT}: naïve café 😀\n\ttab, 日本語 x = [1, 23,  456]\r\n\n  it's 10\u00a0% \u2028"
CHARS = "".join(sorted(set(UNICODE)))
NEW = 40   # tokens that each program writes
KINDS = {
    "gpt2": {},
    "characters": {"vocab_size": len(CHARS)},
    "starcoder2": {
        "use_rope": True, "use_gqa": True, "n_kv_head": 2, "use_swa": True, "window_size": 16,
    },
    "gpt_bigcode": {"use_gqa": True, "n_kv_head": 1},
    "gpt_neo": {"use_swa": True, "window_size": (0, 16), "bias": False},
}
RUN = [
    *TINY, "--dataset=plays", "--n_head=4", "--n_embd=64", "--block_size=64", "--batch_size=4",
    "--max_iters=200", "--warmup_iters=20", "--learning_rate=3e-3", "--eval_interval=100",
]


def kinds(*names):
    return pytest.mark.parametrize("kind", names)


def needs(package, *modules):
    missing = any(find_spec(module) is None for module in modules)
    return pytest.mark.skipif(missing, reason=f"{package} is not installed")


@pytest.fixture
def model(kind, request):
    """A random model of this kind, also in the folder exported. Large weights make it talkative."""
    if kind == "characters":
        spec = {"kind": "char", "chars": CHARS}
    else:
        request.getfixturevalue("gpt2_tokenizer")   # or skip
        spec = {"kind": "gpt2"}
    torch.manual_seed(0)
    shape = {"block_size": 64, "n_layer": 2, "n_head": 4, "n_embd": 64}
    model = GPT(GPTConfig(**shape, **KINDS[kind])).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    model.tokenizer_spec = spec
    assert len(set(greedy(model))) > NEW / 4   # not the same few tokens again and again
    model.save_pretrained("exported")
    return model


def run(*command):
    """Run a Python program without a network."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": "hf_home"}
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, env=env, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr


def greedy(model):
    """The ids of the prompt, and those that follow, by our own model"""
    ids = Tokenizer(model.tokenizer_spec).encode(PROMPT)
    return model.generate(torch.tensor([ids]), NEW, temperature=0)[0].tolist()


# ------------------------------------------------------------------------------------------------
# safetensors and tokenizers

@kinds("gpt2", "characters")
def test_safetensors_reads_every_weight(model):
    theirs = safetensors.torch.load_file("exported/model.safetensors")
    ours = dict(model.named_parameters())
    assert theirs.keys() == ours.keys()
    for name, p in ours.items():
        transposed = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        assert torch.equal(theirs[name], p.t() if transposed else p), name


@kinds("gpt2", "characters")
def test_tokenizers_reads_text_as_we_do(model):
    theirs = tokenizers.Tokenizer.from_file("exported/tokenizer.json")
    ids = Tokenizer(model.tokenizer_spec).encode(UNICODE)
    assert theirs.encode(UNICODE).ids == ids
    assert theirs.decode(ids) == UNICODE


# ------------------------------------------------------------------------------------------------
# transformers

@pytest.mark.slow
@kinds(*KINDS)
def test_a_pipeline_of_transformers_writes_what_we_write(model):
    ids = greedy(model)
    pipeline = transformers.pipeline("text-generation", model="exported", device="cpu")
    options = {"max_new_tokens": NEW, "do_sample": False}
    (out,) = pipeline(PROMPT, return_tensors=True, **options)
    assert list(out["generated_token_ids"]) == ids
    (out,) = pipeline(PROMPT, **options)
    assert out["generated_text"] == Tokenizer(model.tokenizer_spec).decode(ids)

    tokenizer = transformers.AutoTokenizer.from_pretrained("exported")
    assert tokenizer.decode(tokenizer(UNICODE)["input_ids"]) == UNICODE


# ------------------------------------------------------------------------------------------------
# lm-evaluation-harness

TASKS = {
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "our_choice",
        "metric_list": [{"metric": "acc"}],
    },
    "continuation": {
        "output_type": "generate_until",
        "doc_to_text": "question",
        "doc_to_target": "our_continuation",
        "generation_kwargs": {"do_sample": False, "max_gen_toks": NEW, "until": []},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def evaluate(document, tasks, **options):
    """Run the harness on the exported model and one document -> {task: its results}"""
    Path("document.json").write_text(json.dumps([document]))
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "document.json"}},
        "test_split": "test",
    }
    Path("tasks").mkdir()
    for name in tasks:
        task = {"task": name, **data, **TASKS[name]}
        Path(f"tasks/{name}.yaml").write_text(json.dumps(task))   # JSON is YAML
    model_args = {"pretrained": "exported", **options}
    run("-m", "lm_eval", "--model=hf", "--device=cpu", "--output_path=results.json",
        "--model_args", ",".join(f"{key}={value}" for key, value in model_args.items()),
        "--include_path=tasks", "--tasks", ",".join(tasks))
    (file,) = Path().glob("results_*.json")   # with the date in its name
    return json.loads(file.read_text(encoding="utf-8"))["results"]


@torch.no_grad()
def surprise(model, ids):
    """-log p of ids[1:], by block_size tokens at a time; the last block overlaps with another."""
    T = model.config.block_size
    total = 0.0
    for first in range(0, len(ids) - 1, T):
        end = min(first + T, len(ids) - 1)
        begin = max(0, end - T)
        logits, _ = model(torch.tensor([ids[begin:end]]))
        targets = torch.tensor(ids[begin + 1:end + 1])
        losses = F.cross_entropy(logits[0], targets, reduction="none")
        total += losses[first - begin:].sum().item()
    return total


def trained(tokenizer):
    """A model after 200 steps on Shakespeare, also in the folder exported"""
    prepare_text(Path("data/plays"), [SHAKESPEARE_TEXT], tokenizer)
    train.main(RUN)
    model = GPT.from_pretrained("out")
    model.save_pretrained("exported")
    return model


@pytest.mark.slow
@needs("lm-eval[hf]", "lm_eval", "accelerate")
@needs_shakespeare
@pytest.mark.parametrize("kind", ["gpt2", "char"])
def test_the_harness_evaluates_what_we_evaluate(kind, request):
    if kind == "gpt2":
        request.getfixturevalue("gpt2_tokenizer")   # or skip
    model = trained(kind)
    tokenizer = Tokenizer(model.tokenizer_spec)
    text = SHAKESPEARE_TEXT.read_text(encoding="utf-8")[-3000:]
    choices = ["thousand", "that is", "the king"]
    by_choice = [surprise(model, tokenizer.encode(f"{PROMPT} {choice}")) for choice in choices]
    document = {
        "text": text,
        "question": PROMPT,
        "choices": choices,
        "our_choice": by_choice.index(min(by_choice)),
        "our_continuation": tokenizer.decode(greedy(model)).removeprefix(PROMPT),
    }
    tasks = list(TASKS)
    options = {}
    if kind == "char":   # no character begins or ends a text, and the harness asks for both
        tasks.remove("continuation")
        options["prefix_token_id"] = tokenizer.start
    results = evaluate(document, tasks, **options)

    nats = surprise(model, [tokenizer.start, *tokenizer.encode(text)])
    ours = math.exp(nats / len(text.encode()))
    assert results["rolling"]["byte_perplexity,none"] == pytest.approx(ours, rel=1e-4)
    assert results["choice"]["acc,none"] == 1
    assert kind == "char" or results["continuation"]["exact_match,none"] == 1


# ------------------------------------------------------------------------------------------------
# llama.cpp

def written_by_llama_cpp():
    """Convert the exported model to GGUF -> the ids of the prompt, and those that follow"""
    from llama_cpp import Llama
    script = Path(os.environ["LLAMA_CPP"], "convert_hf_to_gguf.py")
    run(script, "exported", "--outfile=model.gguf", "--outtype=f32")
    llama = Llama("model.gguf", n_ctx=64, verbose=False)
    ids = llama.tokenize(PROMPT.encode())
    ids += islice(llama.generate(ids, temp=0), NEW)
    llama.close()
    return ids


needs_llama_cpp = pytest.mark.skipif(
    "LLAMA_CPP" not in os.environ, reason="LLAMA_CPP is not set to a checkout of llama.cpp")


@pytest.mark.slow
@needs_llama_cpp
@needs("llama-cpp-python", "llama_cpp")
@kinds("gpt2", "gpt_bigcode")
def test_llama_cpp_writes_what_we_write(model):
    assert written_by_llama_cpp() == greedy(model)


@pytest.mark.slow
@needs_llama_cpp
@needs("llama-cpp-python", "llama_cpp")
@kinds("starcoder2")
def test_llama_cpp_knows_no_window_of_a_starcoder2(model):
    theirs = written_by_llama_cpp()
    assert theirs == greedy(GPT.from_pretrained("exported", use_swa=False, window_size=None))
    ours = greedy(model)
    inside = model.config.window_size + 1   # the last token of a window is followed by one more
    assert ours[:inside] == theirs[:inside] and ours != theirs


# ------------------------------------------------------------------------------------------------
# CTranslate2

@pytest.mark.slow
@needs("ctranslate2", "ctranslate2")
@kinds("gpt2", "gpt_bigcode")
def test_ctranslate2_writes_what_we_write(model):
    from ctranslate2 import Generator
    from ctranslate2.converters import TransformersConverter
    TransformersConverter("exported").convert("converted")
    prompt = tokenizers.Tokenizer.from_file("exported/tokenizer.json").encode(PROMPT).tokens
    options = {"max_length": NEW, "include_prompt_in_result": False, "sampling_topk": 1}
    (out,) = Generator("converted").generate_batch([prompt], **options)
    assert out.sequences_ids[0] == greedy(model)[-NEW:]
