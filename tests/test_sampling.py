"""sample.py: text from a trained model."""

from pathlib import Path

import pytest
import torch
from helpers import TINY, fails

import sample
import train
from model import GPT, GPTConfig
from prepare_data import prepare_text

pytestmark = pytest.mark.usefixtures("short_sample")


@pytest.fixture
def run(capsys):
    """A tiny trained run in out/"""
    train.main(TINY)
    capsys.readouterr()


def test_sample_streams_prompt_and_text_and_reports_its_speed(run, capsys):
    sample.main(["--out_dir=out", "--prompt=the cat", "--max_new_tokens=20", "--num_samples=2",
                 "--top_k=5", "--top_p=0.9", "--device=cpu"])
    out, err = capsys.readouterr()
    first, second = out.split("-" * 80 + "\n")
    assert first.startswith("the cat") and second.startswith("the cat")
    assert len(first) == len(second) == len("the cat") + 20 + len("\n")
    assert first != second
    assert err.splitlines()[-1].startswith("40 tokens in ") and "tokens/s" in err


def test_init_from_resume_means_the_run_as_in_nanoGPT(run, capsys):
    sample.main(["--init_from=resume", "--out_dir=out", "--max_new_tokens=5", "--device=cpu"])
    assert len(capsys.readouterr().out) == 6


def test_sample_is_repeatable_and_greedy_ignores_the_seed(run, capsys):
    def text(*flags):
        sample.main(["--out_dir=out", "--max_new_tokens=30", "--device=cpu", *flags])
        return capsys.readouterr().out
    assert text("--seed=1") == text("--seed=1")
    assert text("--seed=1") != text("--seed=2")
    assert text("--seed=1", "--temperature=0") == text("--seed=2", "--temperature=0")


def test_prompt_may_come_from_a_file(run, capsys):
    Path("prompt.txt").write_text("the dog\n", newline="")
    flags = ["--prompt_file=prompt.txt", "--max_new_tokens=5", "--device=cpu"]
    sample.main(["--out_dir=out", *flags])
    assert capsys.readouterr().out.startswith("the dog\n")


def test_prompt_may_contain_equal_signs(capsys):
    Path("text.txt").write_text("a=b=c " * 400)
    prepare_text(Path("data/tiny"), ["text.txt"], "char")
    train.main(TINY)
    capsys.readouterr()
    sample.main(["--out_dir=out", "--prompt=a=b", "--max_new_tokens=5", "--device=cpu"])
    assert capsys.readouterr().out.startswith("a=b")


def test_character_of_several_tokens_is_shown_whole(capsys, monkeypatch, gpt2_tokenizer):
    """Every piece of output is text that stays: no half character that would be mended later."""
    text = "😀é日本"
    tokens = gpt2_tokenizer.encode(text)
    assert len(tokens) > len(text)
    model = GPT(GPTConfig(8, 50257, 1, 2, 16)).eval()
    pieces = []

    def note(*args, **options):
        if "file" not in options:
            pieces.append("".join(args))
    monkeypatch.setattr(sample, "load", lambda *args: (model, gpt2_tokenizer))
    monkeypatch.setattr(GPT, "stream",
                        lambda *args, **options: iter(torch.tensor(tokens).view(-1, 1, 1)))
    monkeypatch.setattr("builtins.print", note)
    sample.main(["--device=cpu"])
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("argv, match", [
    (["--prompt=Quetzal"], "does not know the character"),
    (["--prompt="], "empty prompt"),
    (["--prompt_file=none.txt"], "none.txt"),
    (["--prompt_file=latin.txt"], "latin.txt is not UTF-8"),
    (["--prompt=a", "--prompt_file=text.txt"], "not both"),
    (["--start=FILE:x.txt"], "--start is nanoGPT's: here it is --prompt=TEXT, or --prompt_file"),
])
def test_bad_prompt_is_one_clear_line(argv, match, run):
    Path("latin.txt").write_bytes("caf\u00e9!".encode("latin1"))
    fails(sample, "--out_dir=out", "--device=cpu", *argv, match=match)


@pytest.mark.parametrize("flag", [
    "--temperature=-0.5", "--top_k=0", "--top_p=0", "--top_p=1.5", "--seed=-1",
    "--num_samples=0", "--max_new_tokens=0", "--device=meta", "--device=tpu9",
])
def test_value_out_of_range_is_one_clear_line(flag, run):
    fails(sample, "--out_dir=out", "--device=cpu", flag, match=flag.removeprefix("--"))


@pytest.mark.parametrize("argv, match", [
    (["--out_dir=nowhere"], "nowhere.* no best.pt"),
    (["--init_from=nowhere"], "nowhere.*gpt2"),
])
def test_missing_model_is_one_clear_line(argv, match):
    fails(sample, "--device=cpu", *argv, match=match)


def test_folder_of_weights_without_a_tokenizer_is_one_clear_line():
    GPT(GPTConfig(8, 17, 1, 2, 16)).save_pretrained("weights")
    fails(sample, "--device=cpu", "--init_from=weights", match="^error: weights .*has no tokenizer")
