"""
The first command of the README always works: where Shakespeare is neither there nor to be had,
`python train.py config/shakespeare.py` trains on the Python library of this machine.
"""

import io
import runpy
import sys
from pathlib import Path

import pytest
from helpers import HERE, LINES, TINY, Server, checkpoint, digest, fails, without

import sample
import train
from plumbing.token_files import load_meta
from prepare_data import SHAKESPEARE, prepare

pytestmark = pytest.mark.usefixtures("short_sample")
CONFIG = str(HERE / "config" / "shakespeare.py")
FIRST = [CONFIG, "--out_dir=out", *without(TINY, "dataset")]
PLACE = str(Path("data/shakespeare/input.txt"))


@pytest.fixture
def unreachable(monkeypatch):
    monkeypatch.setitem(SHAKESPEARE, "url", "http://127.0.0.1:9/input.txt")   # a closed port


@pytest.fixture
def reachable(server, monkeypatch):
    """Our server has a Shakespeare of its own, whose hash is the expected one."""
    Server.files["/input.txt"] = (LINES.title() * 40).encode()
    monkeypatch.setitem(SHAKESPEARE, "url", f"{server}/input.txt")
    monkeypatch.setitem(SHAKESPEARE, "sha256", digest("/input.txt"))


def trained_on():
    """The name of the dataset that the checkpoint names, whose tokenizer it must have"""
    saved = checkpoint()
    name = saved["train_config"]["dataset"]
    assert saved["tokenizer"] == load_meta(f"data/{name}")["tokenizer"]
    return name


def notes(out):
    """The lines about the substitute"""
    return [line for line in out.splitlines() if PLACE in line]


# ------------------------------------------------------------------------------------------------
# Without the text

def test_run_without_network_trains_on_stdlib_and_says_so_first_and_last(
        library, unreachable, capsys):
    train.main(FIRST)
    out, err = capsys.readouterr()
    assert trained_on() == "stdlib"
    first, last = notes(out + err)
    assert first == last
    assert "Shakespeare" in first and "Python" in first and "library" in first
    lines = out.splitlines()
    assert lines.index(first) < next(i for i, line in enumerate(lines) if "step 3/12" in line)
    assert lines[-3:].count(last) == 1


@pytest.mark.parametrize("fault", [403, 500, "cut"])
def test_server_that_does_not_serve_counts_as_unreachable(fault, library, reachable, capsys):
    Server.files["/input.txt"] *= 300   # more than "cut" lets pass
    Server.fault = fault
    train.main(FIRST)
    assert trained_on() == "stdlib"
    assert len(notes(capsys.readouterr().out)) == 2


def test_page_of_a_firewall_is_not_taken_for_shakespeare(library, reachable, capsys):
    Server.files["/input.txt"] = b"<html>please log in</html>"
    train.main(FIRST)
    assert trained_on() == "stdlib"
    assert len(notes(capsys.readouterr().out)) == 2
    assert not Path(PLACE).exists()


def test_sampling_from_the_substitute_works(library, unreachable, capsys):
    train.main(FIRST)
    capsys.readouterr()
    sample.main(["--out_dir=out", "--prompt=x = ", "--max_new_tokens=20", "--device=cpu"])
    assert capsys.readouterr().out.startswith("x = ")


@pytest.mark.parametrize("init_from", ["resume", "auto"])
def test_resuming_stays_on_stdlib_even_if_shakespeare_has_become_available(
        init_from, library, reachable):
    Server.fault = 403
    train.main([*FIRST, "--max_iters=6"])
    Server.fault = None
    train.main([*FIRST, f"--init_from={init_from}"])
    assert trained_on() == "stdlib"
    assert checkpoint()["step"] == 12


def test_resuming_stays_on_stdlib_even_if_shakespeare_has_been_prepared(
        library, reachable, capsys):
    Server.fault = 403
    train.main([*FIRST, "--max_iters=6"])
    Server.fault = None
    prepare("shakespeare")
    capsys.readouterr()
    train.main([*FIRST, "--init_from=resume"])
    assert trained_on() == "stdlib"
    assert checkpoint()["step"] == 12
    assert "dataset was" not in capsys.readouterr().out


def test_evaluating_the_substitute_works(library, unreachable, capsys):
    train.main(FIRST)
    train.main([*FIRST, "--init_from=resume", "--eval_only"])
    assert "validation loss" in capsys.readouterr().out.splitlines()[-1]


def test_machine_with_neither_text_nor_library_gets_one_clear_line(library, unreachable):
    for path in Path("lib").rglob("*.py"):
        path.unlink()
    fails(train, *FIRST, match="no Python files in lib")
    assert not Path("out").exists()


# ------------------------------------------------------------------------------------------------
# With the text

def test_shakespeare_is_used_if_it_can_be_downloaded(library, reachable, capsys):
    train.main(FIRST)
    assert trained_on() == "shakespeare"
    assert not notes(capsys.readouterr().out)
    assert not Path("data/stdlib").exists()


def test_shakespeare_is_used_if_the_text_is_there(library, reachable, monkeypatch):
    Path(PLACE).parent.mkdir()
    Path(PLACE).write_bytes(Server.files["/input.txt"])
    monkeypatch.setitem(SHAKESPEARE, "url", "http://127.0.0.1:9/input.txt")
    train.main(FIRST)
    assert trained_on() == "shakespeare"


def test_shakespeare_is_used_if_it_is_prepared(library, reachable, monkeypatch):
    prepare("shakespeare")
    Path(PLACE).unlink()
    monkeypatch.setitem(SHAKESPEARE, "url", "http://127.0.0.1:9/input.txt")
    train.main(FIRST)
    assert trained_on() == "shakespeare"


def test_run_from_scratch_takes_shakespeare_once_it_is_there(library, reachable):
    Server.fault = 403
    train.main(FIRST)
    Server.fault = None
    train.main(FIRST)
    assert trained_on() == "shakespeare"


def test_wrong_text_in_its_place_is_an_error(library, unreachable):
    Path(PLACE).parent.mkdir()
    Path(PLACE).write_text("not Shakespeare")
    fails(train, *FIRST, match="input.txt has the wrong sha256")
    assert Path(PLACE).read_text() == "not Shakespeare"


# ------------------------------------------------------------------------------------------------
# No substitute

def refuses(*argv, match):
    fails(train, *argv, match=match)
    assert not Path("data/stdlib").exists() and not Path("out").exists()


@pytest.mark.parametrize("argv", [
    [*FIRST, "--dataset=shakespeare"],
    ["--dataset=shakespeare", *FIRST],
    [*without(TINY, "dataset"), "--dataset=shakespeare"],
])
def test_dataset_named_on_the_command_line_has_no_substitute(argv, library, unreachable):
    refuses(*argv, match="cannot fetch http://127.0.0.1:9/input.txt.*stdlib")


@pytest.mark.parametrize("name, match", [
    ("shakespeare_bpe", "cannot fetch http://127.0.0.1:9/input.txt"),
    ("fineweb", "cannot fetch http://127.0.0.1:9/datasets"),
    ("mine", "unknown dataset 'mine'"),
])
def test_other_datasets_named_by_files_have_no_substitute(
        name, match, library, unreachable, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    Path("own.py").write_text(f"dataset = {name!r}")
    refuses(*without(TINY, "dataset"), "own.py", match=match)


# ------------------------------------------------------------------------------------------------
# On a CPU, and in notebooks

def test_on_a_CPU_a_long_evaluation_is_announced_before_any_data_is_fetched(monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    fails(train, "--device=cpu", "--dtype=float32", match="cannot fetch")
    out = capsys.readouterr().out
    assert "an evaluation reads up to 10,485,760 tokens" in out
    assert out.index("evaluation") < out.index("fineweb")
    fails(train, CONFIG, "--dataset=nothing", "--device=cpu", match="unknown")
    assert "evaluation" not in capsys.readouterr().out


class NotebookStream(io.StringIO):
    """What sys.stdout is in a notebook: like this class, it has no reconfigure()."""


def test_scripts_run_in_a_notebook(monkeypatch, short_sample):
    """%run is runpy in the process of the notebook; train.main may also be called."""
    monkeypatch.setattr(sys, "stdout", NotebookStream())
    monkeypatch.setattr(sys, "stderr", NotebookStream())
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, "--max_iters=1"])
    runpy.run_path(str(HERE / "train.py"), run_name="__main__")
    train.main([*TINY, "--max_iters=2"])
    monkeypatch.setattr(sys, "argv", ["sample.py", "--max_new_tokens=3", "--device=cpu"])
    runpy.run_path(str(HERE / "sample.py"), run_name="__main__")
    assert "more of it" in sys.stdout.getvalue() and "3 tokens in" in sys.stderr.getvalue()
