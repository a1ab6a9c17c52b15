"""The assessment: its commands explain themselves, and its formulas are what the model does."""

import math
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import HERE, fails

import train
from assessment import __main__ as assessment
from assessment import cost, figures, measure, plots, runs, speed
from assessment.cost import cache_bytes, fill
from model import GPTConfig
from test_model import MIXED_WINDOWS, W, every_variant, tiny

PAGE = HERE / "assessment" / "README.md"
PICTURES = [f"{draw.__name__.removeprefix('draw_')}.png" for draw in plots.PICTURES]


def test_python_m_assessment_lists_its_commands():
    command_line = [sys.executable, "-m", "assessment"]
    done = subprocess.run(command_line, cwd=HERE, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    for command in assessment.COMMANDS:
        assert f"python -m assessment {command}" in done.stdout, command
    assert done.stderr == ""


@pytest.mark.parametrize("argv, match", [
    (["price"], "^error: unknown command 'price': .*cost.*speed.*claims.*plots"),
    (["cost", "attenton"], "^error: cost attenton"),
    (["speed", "decoding"], "^error: .*decoding"),
    (["claims", "ropes"], "^error: claims ropes: .*rates"),
    (["figures", "all"], "^error: figures"),
    (["plots", "cost"], "^error: plots"),
    (["cost", "--csv", "--tiny"], "^error: cost: --csv keeps figures"),
    (["speed", "decode", "--csv", "--tiny"], "^error: speed: --csv keeps figures"),
    (["speed", "decode", "start", "--tiny"], "^error: speed: the part start .*leave out --tiny"),
    (["speed", "steps", "--csv"], "^error: speed: .*steps .*needs --nanogpt=FOLDER"),
], ids=["command", "of cost", "of speed", "of claims", "of figures", "of plots", "tiny figures",
        "tiny speeds", "tiny start", "without nanoGPT"])
def test_wrong_command_or_part_is_one_clear_line_before_anything_is_measured(argv, match):
    fails(assessment, *argv, match=match)


@pytest.mark.parametrize("operation, kind", [
    ("aten::_log_softmax_backward_data", "loss"),
    ("aten::_softmax_backward_data", "attention"),
    ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
    ("aten::addmm", "matrix products"),
    ("aten::_fused_adamw_", "optimizer"),
    ("aten::native_layer_norm_backward", "GELU and LayerNorm"),
    ("aten::linalg_vector_norm", "optimizer"),
])
def test_profile_counts_an_operation_once_under_its_kind(operation, kind):
    assert speed.kind_of(operation) == kind


def test_speed_keeps_its_figures_beside_those_of_other_parts(monkeypatch):
    monkeypatch.setattr(measure, "RESULTS", Path("results"))
    monkeypatch.setattr(speed, "hardware", lambda gpu: "this machine")
    monkeypatch.setitem(speed.PARTS, "profile", lambda nanogpt, tiny: speed.profile_here(tiny=True))
    speed.write_csv("decode", "another", {"decoding": {"plainGPT": ("ms", [3.0, 1.0, 2.0])}})
    for _ in range(2):
        assessment.main(["speed", "profile", "--csv"])
    first, *others = measure.read_results("speed.csv")
    assert [first[key] for key in ("hardware", "median", "low", "high")] == ["another", *"213"]
    assert {row["part"] for row in others} == {"profile"}
    assert len({row["who"] for row in others}) == len(others)


def test_cost_keeps_ratios_that_are_paired_by_round(monkeypatch):
    monkeypatch.setattr(measure, "RESULTS", Path("results"))
    monkeypatch.setattr(cost, "hardware", lambda: "this machine")
    seconds = {"gpt2": [1.0, 2.0, 4.0], "swa": [0.5, 1.0, 1.0]}   # 2, 2 and 4 times as fast
    cost.write_csv({("step", 8): seconds, ("memory", 8): {"gpt2": [10.0], "swa": [5.0]}}, "cpu")
    gpt2, swa, _, memory = measure.read_results("variants.csv")
    half = 4.303 * statistics.stdev([2, 2, 4]) / math.sqrt(3)
    assert float(gpt2["times_as_fast"]) == 1 and float(gpt2["half"]) == 0
    assert float(swa["times_as_fast"]) == pytest.approx(8 / 3, abs=1e-4)
    assert float(swa["half"]) == pytest.approx(half, abs=1e-4)
    assert (memory["median"], memory["times_as_fast"]) == ("5", "")


@pytest.mark.parametrize("name", ["gpt2_xl", "modern", "gqa"])
def test_small_models_in_place_of_a_config_files_are_valid(name):
    config = train.load_config([str(HERE / "config" / f"{name}.py")])[1]
    assert cost.tiny_model(config).n_layer == 1
    assert cost.four_blocks(config).n_layer == 4
    two = GPTConfig(n_layer=2, use_swa=True, window_size=(32, 0))
    assert cost.four_blocks(two).windows == (32, 0, 32, 0)


def allocated_bytes(cache):
    return sum(t.nbytes for layer in cache.layers for t in (layer.k, layer.v))


@every_variant
@pytest.mark.parametrize("n", [W, 23, 32])
def test_formula_of_the_cache_is_what_is_allocated_for_a_block_size_of_n(switches, n):
    model = tiny(block_size=n, **switches)
    assert allocated_bytes(model.new_cache(2)) == 2 * cache_bytes(model.config, n)


@every_variant
@pytest.mark.parametrize("n", [1, 4, 23, 32])
def test_formula_of_the_cache_is_what_n_tokens_take(switches, n):
    fill(tiny(**switches), n, B=2)   # raises AssertionError otherwise


def test_formula_of_the_cache_in_figures():
    assert cache_bytes(GPTConfig(), 1024) == 2 * 12 * 1024 * 768 * 4
    assert cache_bytes(GPTConfig(use_gqa=True, n_kv_head=4), 1024) == 2 * 12 * 1024 * 256 * 4
    assert cache_bytes(GPTConfig(use_swa=True, window_size=256), 1024) == 2 * 12 * 256 * 768 * 4
    three_layers = GPTConfig(n_layer=3, **MIXED_WINDOWS)
    assert cache_bytes(three_layers, 100, itemsize=2) == 2 * (W + 100 + 2 * W) * 768 * 2


def test_filled_cache_continues_as_a_read_one_does():
    model = tiny()
    logits, _ = model(torch.tensor([[1], [2]]), cache=fill(model, 31, B=2))
    assert logits.shape == (2, 1, 101)
    with pytest.raises(ValueError, match="33 tokens"):
        model(torch.tensor([[1, 2]]), cache=fill(model, 31))


def draw_all(folder, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(plots, "HERE", folder)
    assessment.main(["plots"])


def test_plots_draws_every_picture_from_the_results(tmp_path, monkeypatch):
    draw_all(tmp_path, monkeypatch)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == sorted(PICTURES)
    assert sorted(path.name for path in PAGE.parent.glob("*.png")) == sorted(PICTURES)
    for name in PICTURES:
        assert f"]({name})" in PAGE.read_text(encoding="utf-8"), name


@pytest.mark.slow
def test_pictures_are_those_of_the_results_byte_for_byte(tmp_path, monkeypatch):
    draw_all(tmp_path, monkeypatch)
    for name in PICTURES:
        assert (tmp_path / name).read_bytes() == (PAGE.parent / name).read_bytes(), name


# ------------------------------------------------------------------------------------------------
# The page

def test_every_figure_in_the_pages_is_that_of_the_results():
    assert figures.differences() == []


@pytest.mark.parametrize("old, new", [
    (r"(?<=<!-- table: scoreboard -->\n\n)\|", "| changed |"),
    (r"(?<=\n\*\*In short\.\*\* )", "It is 7.77 times as good. "),
], ids=["in a table", "in a sentence"])
def test_figure_that_is_not_of_the_results_is_found(old, new, tmp_path, monkeypatch):
    page = tmp_path / "README.md"
    page.write_text(re.sub(old, new, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    monkeypatch.setattr(figures, "ASSESSMENT", page)
    assert len(figures.differences()) == 1
    fails(assessment, "figures", match="differ from results")


def test_table_that_is_missing_is_found(tmp_path, monkeypatch):
    page = tmp_path / "README.md"
    text = PAGE.read_text(encoding="utf-8")
    page.write_text(text.replace("<!-- table: rates -->", ""), encoding="utf-8")
    monkeypatch.setattr(figures, "ASSESSMENT", page)
    assert "table rates stands 0 times in the pages" in figures.differences()
    page.write_text(text.replace("<!-- table: rates -->", "<!-- table: rate -->"), encoding="utf-8")
    fails(assessment, "figures", match="there is no table rate: choose from .*rates")


def test_table_without_an_end_takes_nothing_with_it():
    page = "<!-- table: heads -->\n\nprose\n\n<!-- table: adamw -->\n\nold\n\n<!-- end -->\n"
    written = figures.renewed(page)
    assert "prose" in written and "old" not in written


def test_scoreboard_answers_the_questions_for_each_variant_on_the_first_screen():
    first_screen = PAGE.read_text(encoding="utf-8").splitlines()[:25]
    table = [line for line in first_screen if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert cells[0][1:] == ["gpt2", "rope", "gqa", "swa", "all three"]
    assert len(cells) == 2 + 11
    for question, *answers in cells[2:]:
        assert question.startswith("[") and len(answers) == 5 and all(answers), question


def test_page_has_at_most_2500_words():
    words = PAGE.read_text(encoding="utf-8").split()
    assert len([word for word in words if any(map(str.isalnum, word))]) <= 2500


def test_every_test_that_the_page_names_exists():
    names = set(re.findall(r"`(test_\w+)`", PAGE.read_text(encoding="utf-8")))
    sources = [HERE / "test_model.py", *HERE.glob("tests/test_*.py")]
    defined = "".join(path.read_text(encoding="utf-8") for path in sources)
    assert len(names) > 10
    for name in names:
        assert f"def {name}(" in defined, name


# ------------------------------------------------------------------------------------------------
# Runs of one's own

HEADER = "step,tokens,train_loss,val_loss,lr,grad_norm,tokens_per_s,elapsed_s\n"


def test_runs_draws_the_losses_of_several_runs(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    for name in ("out-a", "out-b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_text(
            HEADER + "0,0,,4.2,,,,1.0\n10,99,3.1,,1e-3,0.5,9,2.0\n10,99,,3.0,,,,2.5\n20,199,2.")
    assert runs.read_losses("out-a") == {"train_loss": [(10, 3.1)],
                                         "val_loss": [(0, 4.2), (10, 3.0)]}
    assessment.main(["runs", "out-a", "out-b/metrics.csv"])
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text, match", [
    (None, "metrics.csv does not exist"),
    ("a,b\n1,2\n", "was not written by train.py"),
    (HEADER, "no validation loss yet"),
    (HEADER + "0,0,,four,,,,1\n", "is damaged"),
    (HEADER + "x,0,,4,,,,1\n", "is damaged"),
])
def test_run_that_cannot_be_drawn_is_one_clear_line(text, match, tmp_path):
    if text is not None:
        (tmp_path / "metrics.csv").write_text(text)
    fails(assessment, "runs", tmp_path, match=match)


def test_without_matplotlib_there_is_one_clear_line(tmp_path, monkeypatch):
    (tmp_path / "metrics.csv").write_text(HEADER + "0,0,,4.2,,,,1.0\n")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    fails(assessment, "runs", tmp_path, match="pip install -r requirements-dev.txt")
