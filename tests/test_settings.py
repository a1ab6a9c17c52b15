"""Settings: config files, flags, --help, and every way to get one wrong."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from helpers import HERE, TINY, fails

import train
from model import GPTConfig
from plumbing.settings import read_settings
from train import TrainConfig, load_config

CONFIGS = sorted(path.name for path in (HERE / "config").glob("*.py"))


def config(*names):
    """The paths of files in config/"""
    return [str(HERE / "config" / name) for name in names]


# ------------------------------------------------------------------------------------------------
# Files and flags

def test_defaults_are_GPT2_124M_on_fineweb_and_config_gpt2_says_the_same():
    assert load_config([]) == (TrainConfig(), GPTConfig())
    assert load_config(config("gpt2.py")) == load_config([])


@pytest.mark.parametrize("argv", [
    ["--learning_rate=1", "--eval_only", "--n_layer", "3", "--out_dir=a=b", "--seed", "7"],
    ["--seed=7", "--eval_only=true", "--learning_rate", "1.0", "--out_dir", "a=b", "--n_layer=3"],
])
def test_flags_may_be_written_in_every_form(argv):
    c, gpt_config = load_config(argv)
    assert c == TrainConfig(learning_rate=1.0, eval_only=True, out_dir="a=b", seed=7)
    assert gpt_config == GPTConfig(n_layer=3)
    assert type(c.learning_rate) is float   # an int is a fine float


def test_later_files_win_over_earlier_and_flags_over_files():
    Path("a.py").write_text("n_layer = 5\nn_head = 4\nmax_iters = 10")
    Path("b.py").write_text("n_layer = 6\nn_embd = 64\nmax_iters = 20")
    c, gpt_config = load_config(["--max_iters=30", "a.py", "b.py"])
    assert gpt_config == GPTConfig(n_layer=6, n_head=4, n_embd=64)
    assert c.max_iters == 30


def test_config_file_may_import_and_keep_names_of_its_own():
    Path("a.py").write_text("import math\ndef helper(): pass\n_private = 1\nn_layer = 5")
    assert load_config(["a.py"])[1].n_layer == 5


def test_read_settings_tells_where_each_setting_came_from():
    Path("a.py").write_text("n_layer = 5\ndataset = 'mine'")
    argv = ["a.py", "--n_layer=6", "--seed=7"]
    (c, gpt_config), given = read_settings(argv, "", TrainConfig, GPTConfig)
    assert (c.dataset, c.seed, gpt_config.n_layer) == ("mine", 7, 6)
    assert given == {"n_layer": "flag", "dataset": "file", "seed": "flag"}


def test_config_file_may_come_from_a_windows_editor():
    Path("a.py").write_text("n_layer = 5", encoding="utf-8-sig")
    assert load_config(["a.py"])[1].n_layer == 5


def test_bare_flag_before_a_file_does_not_swallow_it():
    Path("a.py").write_text("n_layer = 5")
    c, gpt_config = load_config(["--eval_only", "a.py"])
    assert c.eval_only and gpt_config.n_layer == 5


def test_optional_settings_take_none():
    assert load_config(["--compile=none"])[0].compile is None
    assert load_config(["--compile"])[0].compile is True
    assert load_config(["--min_lr=0"])[0].min_lr == 0.0


@pytest.mark.parametrize("text, value", [
    ("8", 8),
    ("8,0", (8, 0)),
    ("(8, 0)", (8, 0)),
    ("[8, 0]", (8, 0)),
])
def test_window_is_one_number_or_one_per_layer(text, value):
    argv = ["--n_layer=2", "--use_swa", f"--window_size={text}"]
    assert load_config(argv)[1].window_size == value


def test_text_settings_stay_text():
    assert load_config(["--dataset=123"])[0].dataset == "123"


def test_help_lists_every_setting_with_its_default_and_its_comment(capsys):
    with pytest.raises(SystemExit) as caught:
        load_config(["--help"])
    assert not caught.value.code
    lines = capsys.readouterr().out.splitlines()
    for field in (*dataclasses.fields(TrainConfig), *dataclasses.fields(GPTConfig)):
        start = f"--{field.name}={field.default}"
        line = next(line.strip() for line in lines if line.strip().startswith(f"{start} "))
        assert len(line.removeprefix(start).strip()) > 10, f"{field.name} has no comment"


# ------------------------------------------------------------------------------------------------
# The files in config/

@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_file_is_valid(name):
    load_config(config(name))


@pytest.mark.parametrize("name", CONFIGS)
def test_config_files_import_nothing_of_ours(name):
    imported = re.findall(r"^ *(?:import|from) +(\w+)", Path(*config(name)).read_text(), re.M)
    assert set(imported) <= {"torch"}


@pytest.mark.parametrize("base", ["shakespeare.py", "stdlib.py", "gpt2.py"])
@pytest.mark.parametrize("overlay, switches", [
    ("rope.py", (True, False, False)),
    ("gqa.py", (False, True, False)),
    ("swa.py", (False, False, True)),
    ("modern.py", (True, True, True)),
])
def test_overlays_compose_with_every_config(base, overlay, switches):
    plain = load_config(config(base))[1]
    both = load_config(config(base, overlay))[1]
    assert (both.use_rope, both.use_gqa, both.use_swa) == switches
    assert both.n_embd == plain.n_embd


@pytest.mark.parametrize("name", ["shakespeare.py", "stdlib.py"])
def test_small_configs_are_one_recipe_for_every_CPU(name, monkeypatch):
    """Muon's products are float32 on CPUs, so nothing depends on how fast this one is in bf16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    c, _ = load_config(config(name))
    assert c.optimizer == "muon" and c.learning_rate == 1.5e-2
    assert c.batch_size == c.micro_batch_size   # one accumulation step


# ------------------------------------------------------------------------------------------------
# One clear line for each mistake. (Processes share these lines: test_several_processes_fail.py.)

def refuses(argv, match):
    fails(train, *argv, match=match)
    assert not Path("out").exists()


@pytest.mark.parametrize("argv, match", [
    (["--learning_rat=1"], "learning_rat is not a setting, did you mean learning_rate"),
    (["--zzz=1"], "zzz is not a setting"),
    (["typo.py"], "typo.py: learning_rate_ is not a setting, did you mean learning_rate"),
])
def test_unknown_name_is_refused_and_the_nearest_one_named(argv, match):
    Path("typo.py").write_text("learning_rate_ = 1")
    refuses(argv, match)


@pytest.mark.parametrize("flag, here", [
    ("--gradient_accumulation_steps=40", "micro_batch_size"),
    ("--decay_lr=False", "min_lr=learning_rate"),
    ("--backend=nccl", "gloo on CPUs"),
    ("--always_save_checkpoint", "best.pt"),
    ("--wandb_log=True", "metrics.csv"),
    ("--wandb_project=owt", "metrics.csv"),
    ("--wandb_run_name=gpt2", "metrics.csv"),
])
def test_name_of_nanoGPT_is_refused_with_its_counterpart(flag, here):
    name, _, value = flag.removeprefix("--").partition("=")
    refuses([flag], f"^error: --{name} is nanoGPT's: .*{here}")
    Path("nano.py").write_text(f"{name} = {value!r}")
    refuses(["nano.py"], f"^error: nano.py: {name} is nanoGPT's: .*{here}")


@pytest.mark.parametrize("argv, match", [
    (["--n_layer=four"], "n_layer='four' is of type str, must be int"),
    (["--n_layer=4.0"], "n_layer=4.0 is of type float, must be int"),
    (["--n_layer=True"], "n_layer=True is of type bool, must be int"),
    (["--n_layer={[]:1}"], "n_layer=.* is of type str, must be int"),
    (["--eval_only=1"], "eval_only=1 is of type int, must be bool"),
    (["--min_lr=low"], "min_lr='low' is of type str, must be float or None"),
    (["type.py"], "type.py: out_dir=7 is of type int, must be str"),
])
def test_wrong_type_is_refused(argv, match):
    Path("type.py").write_text("out_dir = 7")
    refuses(argv, match)


@pytest.mark.parametrize("argv", [["--n_layer"], ["--n_layer", "--eval_only"]])
def test_flag_without_its_value_is_refused(argv):
    refuses(argv, "--n_layer needs a value")


@pytest.mark.parametrize("name, reason", [
    ("missing.py", "No such file"),
    ("latin.py", "not UTF-8"),
    (".", ""),
])
def test_config_file_that_cannot_be_read_is_refused(name, reason):
    Path("latin.py").write_bytes("out_dir = 'é'".encode("latin1"))
    refuses([name], f"cannot read the config file {re.escape(name)}.*{reason}")


@pytest.mark.parametrize("source, match", [
    ("n_layer = 1\nn_head = 1 / 0", "line 2: ZeroDivisionError: division by zero"),
    ("n_layer = 1\nn_head = = 2", "line 2: SyntaxError"),
    ("import sys\nsys.exit()", "line 2: SystemExit"),
    ("raise ValueError('one\\ntwo')", "line 1: ValueError: one$"),
    ("import json\nn_layer = json.loads('{')", "line 2: JSONDecodeError"),
])
def test_config_file_that_fails_is_refused_with_its_own_line(source, match):
    Path("fails.py").write_text(source)
    refuses(["fails.py"], f"fails.py, {match}")


@pytest.mark.parametrize("argv, match", [
    (["--batch_size=0"], "batch_size=0 must be at least 1"),
    (["--learning_rate=-1"], "learning_rate=-1.0 must be at least 0"),
    (["--min_lr=-1"], "min_lr=-1.0 must be at least 0 and at most learning_rate"),
    (["--beta2=1"], "beta2=1.0 must be"),
    (["--dtype=float16"], "dtype='float16' must be auto or float32 or bfloat16"),
    (["--seed=99999999999999999999"], "seed=99999999999999999999 must be at least 0"),
    (["--out_dir="], "out_dir.* must not be empty"),
    (["--n_embd=100", "--n_head=3"], "n_embd=100.* divisible by n_head"),
])
def test_value_out_of_range_is_refused(argv, match):
    refuses(argv, match)


@pytest.mark.parametrize("argv, match", [
    (["--device=hpu"], "device=hpu: must be auto"),
    (["--device=meta"], "device=meta: must be auto"),
    (["--device=tpu9"], "device=tpu9"),
    (["--n_embd=4000000"], "not enough memory"),
    (["--vocab_size=5"], "vocab_size=5 is less than the 17 ids"),
    (["--batch_size=6", "--micro_batch_size=4"],
     "batch_size=6 is not divisible among 1 process.* with 4 sequences"),
])
def test_what_fits_neither_the_machine_nor_the_data_is_refused(argv, match):
    refuses([*TINY, *argv], match)
