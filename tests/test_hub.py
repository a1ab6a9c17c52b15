"""Weights by their name on the Hugging Face Hub, from a server of our own, and those of nanoGPT."""

from pathlib import Path

import pytest
import torch
from helpers import Server, fails
from test_huggingface import SHAPES, hf_bigcode, hf_neo
from test_tokenizers import trained

import sample
import train
from model import GPT, GPTConfig
from plumbing.hub import RELEASES
from plumbing.huggingface import load_tokenizer
from test_model import V, hf_gpt2, hf_starcoder2

CONFIG = b"""{"model_type": "gpt2", "n_positions": 8, "vocab_size": 17, "n_layer": 1, "n_head": 2,
             "n_embd": 16}"""
MODELS = {
    "gpt2": hf_gpt2,
    "gpt_bigcode": lambda: hf_bigcode(SHAPES["wide"]),
    "gpt_neo": lambda: hf_neo(SHAPES["wide"]),
    "starcoder2": hf_starcoder2,
}
SAMPLE = ["--max_new_tokens=4", "--device=cpu"]


@pytest.fixture
def hub(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server)
    Server.files = {}
    return server


def publish(folder, repository):
    for path in Path(folder).iterdir():
        Server.files[f"/{repository}/resolve/main/{path.name}"] = path.read_bytes()


def asked():
    return [Path(path).name for path, asked_range, token in Server.asked]


def save_with_characters(model, folder, **options):
    """With a tokenizer of as many characters as the model has ids"""
    model.save_pretrained(folder, **options)
    with_tokenizer = GPT(GPTConfig(8, V, 1, 2, 16))
    chars = "".join(chr(32 + i) for i in range(V))
    with_tokenizer.tokenizer_spec = {"kind": "char", "chars": chars}
    with_tokenizer.save_pretrained("characters")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        Path(folder, name).write_bytes(Path("characters", name).read_bytes())


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "in shards"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_sample_fetches_any_repository_and_continues_a_broken_download(hub, capsys, make, sharded):
    theirs = make()
    options = {"max_shard_size": "120KB"} if sharded else {}
    save_with_characters(theirs, "made", **options)
    assert sharded == Path("made/model.safetensors.index.json").exists()
    publish("made", "owner/some-model.1")
    flags = ["--init_from=owner/some-model.1", "--prompt=hello", *SAMPLE]

    Server.fault, Server.cut_after = "cut", 70_000
    fails(sample, *flags, match="run the same command again to continue from there")
    arrived = list(Path("checkpoints/owner/some-model.1").glob("*.part"))
    assert len(arrived) == 1 and arrived[0].stat().st_size > 0
    Server.fault = None
    capsys.readouterr()
    sample.main(flags)
    assert capsys.readouterr().out.startswith("hello")
    assert any(asked_range for path, asked_range, token in Server.asked)

    Server.asked.clear()   # what is there is not asked for again
    ours = GPT.from_pretrained("owner/some-model.1")
    assert not Server.asked
    idx = torch.arange(20)[None]
    assert (ours(idx)[0] - theirs(idx).logits).abs().max() < 1e-4


def test_older_files_are_taken_if_there_are_no_safetensors(hub):
    theirs = hf_gpt2()
    theirs.save_pretrained("made")
    Path("made/model.safetensors").unlink()
    torch.save(theirs.state_dict(), "made/pytorch_model.bin")
    trained().model.save("made")   # vocab.json and merges.txt, of more ids than the model has
    publish("made", "owner/old")
    fails(sample, "--init_from=owner/old", match="tokenizer has 400 ids, its model 101")
    assert asked() == [
        "config.json", "tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt",
        "added_tokens.json", "model.safetensors", "model.safetensors.index.json",
        "pytorch_model.bin",
    ]


def test_released_weights_have_short_names_and_the_tokenizer_of_GPT2(hub):
    GPT(GPTConfig(8, 50257, 1, 2, 16)).save_pretrained("made")
    assert list(RELEASES) == ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2"]
    for name in RELEASES:
        publish("made", RELEASES[name])
        assert GPT.from_pretrained(name).tokenizer_spec == {"kind": "gpt2"}
    assert asked() == ["config.json", "model.safetensors"] * 5


def test_released_weights_put_there_by_hand_need_no_network(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    GPT(GPTConfig(8, 50257, 1, 2, 16)).save_pretrained("checkpoints/gpt2")
    assert GPT.from_pretrained("gpt2").tokenizer_spec == {"kind": "gpt2"}
    for path in ("checkpoints/gpt2", Path("checkpoints/gpt2").resolve()):
        assert GPT.from_pretrained(path).tokenizer_spec == {"kind": "gpt2"}


def test_training_starts_from_a_repository(hub, capsys):
    save_with_characters(hf_gpt2(), "made")
    publish("made", "owner/name")
    fails(train, "--dataset=tiny", "--init_from=owner/name", "--max_iters=1", "--batch_size=2",
          "--block_size=8", match="owner/name was trained with another tokenizer")


@pytest.mark.parametrize("files, match", [
    ({}, "owner/name is not on this machine, and .*owner/name has no config.json"),
    ({"config.json": CONFIG}, "has none of model.safetensors, .*pytorch_model.bin"),
    ({"config.json": CONFIG, "model.safetensors.index.json": b'{"weight_map": {"a": "b.st"}}'},
     "lacks b.st, which its index names"),
    ({"config.json": CONFIG, "model.safetensors.index.json": b'{"weight_map": {"a": "../b"}}'},
     "'../b' names no file beside it"),
    ({"config.json": b"[]", "model.safetensors": b"x"}, "no JSON dictionary in it"),
    ({"config.json": b'{"model_type": "llama"}', "model.safetensors": b"x"}, "model_type='llama'"),
], ids=["nothing", "no weights", "a part missing", "a part elsewhere", "no config", "a llama"])
def test_repository_that_lacks_something_is_one_clear_line(hub, files, match):
    for name, body in files.items():
        Server.files[f"/owner/name/resolve/main/{name}"] = body
    fails(sample, "--init_from=owner/name", match=match)
    assert "model.safetensors" not in asked() or b"gpt2" in files["config.json"]


def test_path_is_not_taken_for_a_repository(hub):
    Path("out").mkdir()
    for name in ("out/mine", "./mine", "../mine", "out/mine/ckpt.pt"):
        fails(sample, f"--init_from={name}", match=f"^error: {name}: not one of gpt2")
    assert not Server.asked and not Path("checkpoints").exists()


def test_tokenizer_alone_is_fetched_without_the_weights(hub):
    save_with_characters(hf_gpt2(), "made")
    publish("made", "owner/name")
    assert load_tokenizer("owner/name")["kind"] == "char"
    assert load_tokenizer("gpt2-xl") == {"kind": "gpt2"}
    assert "model.safetensors" not in asked()


def test_without_network_the_line_names_the_folder_that_is_not_there(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    fails(sample, "--init_from=out/mine", match="^error: out/mine is not on this machine, and cann")


@pytest.mark.parametrize("status", [401, 403])
def test_private_repository_asks_for_a_token(hub, status):
    Server.files["/owner/name/resolve/main/config.json"] = b"{}"
    Server.fault = status
    fails(sample, "--init_from=owner/name", match=f"answered {status}.*HF_TOKEN")


# ------------------------------------------------------------------------------------------------
# nanoGPT's checkpoints: written here as its train.py does

def nanogpt_checkpoint(path, vocab_size, prefix="", **more):
    torch.manual_seed(5)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "bias": False}
    ours = GPT(GPTConfig(vocab_size=vocab_size, **shape))
    state = {"lm_head.weight": ours.lm_head.weight.detach()}
    for name, p in ours.named_parameters():
        state[f"transformer.{name}"] = p.detach()
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8)   # a mask, without flash attention
    checkpoint = {
        "model": {prefix + name: t for name, t in state.items()},
        "optimizer": {"state": {}, "param_groups": []},
        "model_args": shape | {"vocab_size": vocab_size, "dropout": 0.2},
        "iter_num": 100,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "shakespeare_char"},
    }
    Path(path).parent.mkdir(exist_ok=True)
    torch.save(checkpoint | more, path)
    return ours


@pytest.mark.parametrize("prefix", ["", "_orig_mod."], ids=["plain", "compiled"])
def test_checkpoint_of_nanoGPT_is_a_start(prefix, short_sample):
    theirs = nanogpt_checkpoint("nano/ckpt.pt", 17, prefix)
    ours = GPT.from_pretrained("nano/ckpt.pt")
    assert ours.config == theirs.config and ours.tokenizer_spec is None
    assert all(torch.equal(p, ours.get_parameter(n)) for n, p in theirs.named_parameters())
    train.main(["--dataset=tiny", "--init_from=nano/ckpt.pt", "--max_iters=0", "--device=cpu",
                "--dtype=float32", "--eval_iters=1", "--batch_size=4"])
    assert GPT.from_pretrained("out").tokenizer_spec["kind"] == "char"   # now it can be sampled


@pytest.mark.parametrize("vocab_size, spec", [
    (50257, {"kind": "gpt2"}), (50304, {"kind": "gpt2"}), (50256, None), (65, None),
])
def test_nanoGPT_has_GPT2s_tokens_or_an_unknown_vocabulary(vocab_size, spec):
    nanogpt_checkpoint("nano/ckpt.pt", vocab_size)
    assert GPT.from_pretrained("nano/ckpt.pt").tokenizer_spec == spec


def test_what_a_checkpoint_of_nanoGPT_cannot_do_is_one_clear_line():
    nanogpt_checkpoint("out/ckpt.pt", 18)
    fails(sample, "--init_from=out/ckpt.pt", match="no tokenizer, so its 18 .*docs.fine_tuning")
    fails(train, "--dataset=tiny", "--init_from=resume",
          match="out/ckpt.pt is a checkpoint of nanoGPT.*--init_from=out/ckpt.pt and another")
    fails(train, "--dataset=tiny", "--init_from=out/ckpt.pt", "--out_dir=new",
          match="18 ids and the dataset 17 characters")
    nanogpt_checkpoint("out/ckpt.pt", 17, model={"transformer.wte.weight": 3})
    fails(sample, "--init_from=out/ckpt.pt", match="out/ckpt.pt is a broken checkpoint of nanoGPT")
    nanogpt_checkpoint("out/ckpt.pt", 17, model_args={"n_layer": 2, "legs": 4})
    fails(sample, "--init_from=out/ckpt.pt", match="legs is not a field")


