"""Continuing from a checkpoint, and starting from weights."""

import os
from pathlib import Path

import pytest
import torch
from helpers import (
    LINES,
    TINY,
    checkpoint,
    fails,
    rows,
    same_state,
    val_losses,
    without,
)

import sample
import train
from model import GPT, GPTConfig
from plumbing import device
from prepare_data import prepare_text

pytestmark = pytest.mark.usefixtures("short_sample")
HALF = [*TINY, "--max_iters=6", "--lr_decay_iters=12"]
SHAPELESS = without(TINY, "n_layer", "n_head", "n_embd")
SHAPE_OF_WEIGHTS = without(SHAPELESS, "block_size")


# ------------------------------------------------------------------------------------------------
# Resuming

@pytest.mark.parametrize("optimizer, at", [
    ("adamw", 4),
    ("adamw", 6),
    ("adamw", 11),
    ("muon", 7),
])
def test_resumed_run_is_exact_to_the_bit(optimizer, at):
    flags = [*TINY, f"--optimizer={optimizer}", "--dropout=0.2", "--micro_batch_size=2",
             "--lr_decay_iters=12", "--checkpoint_interval=1"]
    train.main([*flags, "--out_dir=whole"])
    train.main([*flags, f"--max_iters={at}"])
    train.main([*flags, "--init_from=auto"])
    assert same_state(Path("out"), Path("whole"))

    def course(path):   # a run that stops at step 4 or 11 adds a line of its own
        keys = ("step", "train_loss", "val_loss", "lr", "grad_norm")
        return [[row[key] for key in keys] for row in rows(path) if int(row["step"]) % 3 == 0]
    assert course("out/metrics.csv") == course("whole/metrics.csv")


def test_auto_starts_if_there_is_nothing_to_resume():
    train.main([*TINY, "--init_from=auto"])
    assert checkpoint()["step"] == 12


def test_resumed_run_keeps_its_shape_without_being_told_again():
    train.main([*TINY, "--use_rope", "--max_iters=6"])
    train.main([*without(TINY, "n_layer", "n_head", "n_embd"), "--init_from=resume"])
    saved = checkpoint()
    assert saved["step"] == 12
    assert saved["gpt_config"]["use_rope"] and saved["gpt_config"]["n_embd"] == 16


def test_changed_settings_are_named_on_resume(capsys):
    train.main(TINY)
    train.main([*TINY, "--init_from=resume", "--batch_size=8", "--max_iters=14"])
    out = capsys.readouterr().out
    assert "batch_size was 4, is 8" in out and "max_iters was 12, is 14" in out


def test_what_auto_dtype_decided_first_is_kept_on_resume(monkeypatch, capsys):
    """Measured anew under another load it could come out otherwise, and the run not be exact."""
    flags = [*without(TINY, "dtype"), "--dtype=auto"]
    monkeypatch.setattr(device, "bf16_pays", lambda: True)
    train.main([*flags, "--max_iters=6"])
    assert checkpoint()["train_config"]["dtype"] == "bfloat16"
    monkeypatch.setattr(device, "bf16_pays", lambda: False)
    train.main([*flags, "--init_from=resume"])
    assert checkpoint()["train_config"]["dtype"] == "bfloat16"
    assert "dtype was" not in capsys.readouterr().out


def test_resuming_on_another_text_is_refused():
    train.main([*TINY, "--max_iters=6"])
    text = Path("text.txt")
    other = Path("other.txt")
    other.write_text(text.read_text(encoding="utf-8")[::-1], encoding="utf-8", newline="")
    prepare_text(Path("data/tiny"), [other], "char")
    fails(train, *TINY, "--init_from=auto", match="trained on a different text from the one now")
    assert checkpoint()["step"] == 6
    prepare_text(Path("data/tiny"), [text], "char")
    train.main([*TINY, "--init_from=auto", "--max_iters=9"])
    assert checkpoint()["step"] == 9
    prepare_text(Path("data/other"), [other], "char")
    train.main([*TINY, "--init_from=auto", "--dataset=other"])   # as asked
    assert checkpoint()["step"] == 12


@pytest.mark.parametrize("first, then", [("adamw", "muon"), ("muon", "adamw")])
def test_resuming_with_another_optimizer_is_refused(first, then):
    train.main([*TINY, f"--optimizer={first}", "--max_iters=2"])
    fails(train, *TINY, "--init_from=resume", f"--optimizer={then}",
          match=f"was trained with optimizer={first}.*--optimizer={first}")


@pytest.mark.parametrize("argv, match", [
    (["--n_embd=32"], "has another architecture: n_embd is 16.* not 32"),
    (["--n_layer=12"], "has another architecture: n_layer is 2.* not 12"),   # the default
    (["--block_size=4"], "has another architecture: block_size is 8.* not 4"),
    (["--bias=False"], "has another architecture: bias is True.* not False"),
    (["--out_dir=elsewhere"], "elsewhere.ckpt.pt does not exist"),
    (["--dataset=other"], "vocab_size=17 is less than the 18 ids"),
    (["--dataset=upper"], "was trained with another tokenizer"),
])
def test_resuming_what_does_not_fit_is_one_clear_line(argv, match):
    train.main(TINY)
    prepare_other_alphabets()
    before = Path("out/ckpt.pt").read_bytes()
    fails(train, *TINY, "--init_from=resume", *argv, match=match)
    assert Path("out/ckpt.pt").read_bytes() == before


# ------------------------------------------------------------------------------------------------
# metrics.csv

@pytest.mark.parametrize("damage", ["", "7,", "7,224,1.0", "\0" * 300, "seven,1,,,,,,"])
def test_metrics_that_a_crash_damaged_do_not_stop_a_resumed_run(damage):
    train.main(HALF)
    with open("out/metrics.csv", "a", encoding="utf-8") as f:
        f.write(damage)
    train.main([*TINY, "--init_from=resume"])
    assert [int(row["step"]) for row in rows()] == [0, 3, 6, 6, 9, 12, 12]


def test_metrics_that_are_not_ours_are_kept_aside():
    train.main(HALF)
    theirs = Path("out/metrics.csv").read_text().replace(",", ";")
    Path("out/metrics.csv").write_text(theirs, encoding="utf-8-sig")
    train.main([*TINY, "--init_from=resume"])
    assert Path("out/metrics.csv.unknown").read_text(encoding="utf-8-sig") == theirs
    assert [int(row["step"]) for row in rows()] == [6, 9, 12, 12]


# ------------------------------------------------------------------------------------------------
# Broken and hostile checkpoints

class RunsCode:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def replace_checkpoint(raw):
    Path("out/ckpt.pt").write_bytes(raw)
    Path("out/best.pt").unlink()


def is_refused(script, match, *argv):
    before = Path("out/ckpt.pt").read_bytes()
    fails(script, *argv, match=match)
    assert Path("out/ckpt.pt").read_bytes() == before
    assert not Path("harmed").exists()


@pytest.mark.parametrize("spoil, match", [
    pytest.param(lambda raw: raw[:len(raw) // 2], "is cut short or not a checkpoint", id="half"),
    pytest.param(lambda raw: raw[:-1], "is cut short or not a checkpoint", id="a byte too few"),
    pytest.param(lambda raw: b"", "is cut short or not a checkpoint", id="empty"),
    pytest.param(lambda raw: b"hello", "ckpt.pt", id="text"),
])
def test_damaged_checkpoint_is_one_clear_line(spoil, match):
    train.main([*TINY, "--max_iters=1"])
    replace_checkpoint(spoil(Path("out/ckpt.pt").read_bytes()))
    is_refused(train, match, *TINY, "--init_from=resume")
    is_refused(sample, match, "--out_dir=out")


@pytest.mark.parametrize("change, match", [
    (lambda saved: {"model": {}}, "is not a checkpoint of train.py"),
    (lambda saved: saved | {"model": 3}, "is not a checkpoint of train.py"),
    (lambda saved: saved | {"model": {"wte.weight": torch.ones(1)}}, "lacks 27 tensors"),
    (lambda saved: saved | {"gpt_config": {"n_legs": 4}}, "ckpt.pt.*n_legs"),
    (lambda saved: saved | {"gpt_config": saved["gpt_config"] | {"n_head": 3}}, "ckpt.pt.*n_head"),
])
def test_checkpoint_of_something_else_is_one_clear_line(change, match):
    train.main([*TINY, "--max_iters=1"])
    torch.save(change(checkpoint()), "out/ckpt.pt")
    Path("out/best.pt").unlink()
    is_refused(train, match, *TINY, "--init_from=resume")
    is_refused(sample, match, "--out_dir=out")


def test_optimizer_state_of_another_model_is_one_clear_line():
    train.main([*TINY, "--max_iters=1"])
    torch.save(checkpoint() | {"optimizer": {}}, "out/ckpt.pt")
    match = "optimizer's state is not of this model"
    is_refused(train, match, *TINY, "--init_from=resume")


def test_checkpoint_cannot_run_code():
    train.main([*TINY, "--max_iters=1"])
    torch.save({"model": RunsCode()}, "out/ckpt.pt")
    Path("out/best.pt").unlink()
    is_refused(train, "could run code", *TINY, "--init_from=resume")
    is_refused(sample, "could run code", "--out_dir=out")


# ------------------------------------------------------------------------------------------------
# Starting from weights

def save_weights(*shape, **options):
    """The folder weights/ with a random model in Hugging Face's format"""
    GPT(GPTConfig(*shape, **options)).save_pretrained("weights")


@pytest.mark.parametrize("folder", ["first", "weights"])
def test_run_or_folder_of_weights_is_a_start(folder):
    train.main([*TINY, "--out_dir=first"])
    GPT.from_pretrained("first").save_pretrained("weights")
    train.main([*TINY, f"--init_from={folder}", "--eval_interval=1", "--max_iters=1"])
    last = val_losses("first/metrics.csv")[-1]
    assert val_losses()[0] == pytest.approx(last, abs=1e-5)
    assert checkpoint()["step"] == 1   # a new run: its own steps, its own optimizer


def test_run_from_weights_of_another_shape_resumes_with_the_same_flags():
    save_weights(8, 17, 1, 1, 8)
    train.main([*SHAPELESS, "--init_from=weights", "--max_iters=6"])
    for more in ("--max_iters=8", "--max_iters=10"):
        train.main([*SHAPELESS, "--init_from=resume", more])
    assert checkpoint()["step"] == 10
    assert checkpoint()["gpt_config"]["n_embd"] == 8


def test_flag_counts_even_if_it_gives_the_default():
    save_weights(2048, 17, 1, 1, 8, use_rope=True)
    flags = [*SHAPE_OF_WEIGHTS, "--init_from=weights"]
    fails(train, *flags, "--use_rope=False", match="use_rope=False: weights was trained with RoPE")
    default = f"--block_size={GPTConfig.block_size}"
    fails(train, *flags, default, match="block_size=1024 needs 1025")
    train.main([*TINY, f"--vocab_size={GPTConfig.vocab_size}", "--max_iters=0"])
    saved = checkpoint("out/best.pt")
    assert saved["gpt_config"]["vocab_size"] == GPTConfig.vocab_size


def test_best_checkpoint_of_a_run_is_used_and_otherwise_the_last():
    train.main([*TINY, "--max_iters=6"])
    os.replace("out/ckpt.pt", "out/best.pt")
    train.main([*TINY, "--out_dir=later"])
    os.replace("later/ckpt.pt", "out/ckpt.pt")
    for name in ("best.pt", "ckpt.pt"):
        saved = checkpoint(f"out/{name}")["model"]
        loaded = dict(GPT.from_pretrained("out").named_parameters())
        assert all(torch.equal(p, saved[key]) for key, p in loaded.items())
        Path("out", name).unlink()


def test_export_into_the_folder_of_a_run_does_not_hide_the_run(capsys):
    train.main(TINY)
    GPT.from_pretrained("out").save_pretrained("out")
    Path("out/model.safetensors").write_bytes(b"cut off")   # whoever reads it notices
    capsys.readouterr()
    train.main([*TINY, "--init_from=resume"])
    assert "python sample.py --out_dir=out" in capsys.readouterr().out
    sample.main(["--out_dir=out", "--max_new_tokens=5", "--device=cpu"])


def test_weights_may_be_trained_with_a_shorter_block_size():
    train.main([*TINY, "--out_dir=first"])
    GPT.from_pretrained("first").save_pretrained("weights")
    train.main([*SHAPE_OF_WEIGHTS, "--init_from=weights", "--block_size=4", "--dropout=0.1"])
    expected = checkpoint("first/ckpt.pt")["gpt_config"] | {"block_size": 4, "dropout": 0.1}
    assert checkpoint()["gpt_config"] == expected


def test_trained_run_can_be_uptrained_with_fewer_key_value_heads():
    train.main([*TINY, "--out_dir=first"])
    train.main([*TINY, "--init_from=first", "--use_gqa", "--n_kv_head=1", "--max_iters=6"])
    saved = checkpoint()
    assert saved["gpt_config"]["n_kv_head"] == 1
    assert saved["model"]["h.0.attn.c_attn.weight"].shape == (16 + 2 * 8, 16)
    assert val_losses()[-1] < val_losses()[0]


def prepare_other_alphabets():
    """data/other and data/upper: as many characters as data/tiny has, but others"""
    texts = {"other": "".join(map(chr, range(0x100, 0x112))) * 99, "upper": LINES.upper() * 40}
    for name, text in texts.items():
        Path(f"{name}.txt").write_text(text, encoding="utf-8")
        prepare_text(Path("data", name), [f"{name}.txt"], "char")


@pytest.mark.parametrize("argv, match", [
    (["--init_from=weights", "--n_embd=32"], "n_embd=32: weights has 16"),
    (["--init_from=weights", "--block_size=16"], "block_size=16: weights has only 8 positions"),
    (["--init_from=weights", "--dataset=other"], "vocab_size=17 is less than the 18 ids"),
    (["--init_from=lower", "--dataset=upper"], "lower was trained with another tokenizer"),
    (["--init_from=nowhere"], "nowhere.*gpt2, gpt2-medium"),
])
def test_weights_that_do_not_fit_are_one_clear_line(argv, match):
    save_weights(8, 17, 2, 2, 16)
    train.main([*TINY, "--out_dir=lower", "--max_iters=0"])
    prepare_other_alphabets()
    fails(train, *TINY, *argv, match=match)
