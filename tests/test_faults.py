"""Faults of one process: full disks, signals, numbers that overflow, kill -9."""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import (
    TINY,
    checkpoint,
    fails,
    needs_full_disk,
    needs_linux,
    read_until,
    same_state,
    same_weights,
    start,
    val_losses,
)

import prepare_data
import sample
import train
from model import GPT
from plumbing import reporting
from plumbing.checkpoints import as_save_error
from plumbing.checkpoints import load_checkpoint as checkpoint_read
from plumbing.errors import InputError, Unbreakable, report, run_script
from plumbing.run_folder import locked

pytestmark = pytest.mark.usefixtures("short_sample")


def test_out_dir_that_cannot_be_written_is_one_clear_line():
    Path("occupied").write_text("a file")
    fails(train, *TINY, "--out_dir=occupied/out", match="out_dir=occupied.out: Not a directory")
    assert Path("occupied").read_text() == "a file"


@needs_full_disk
@pytest.mark.parametrize("name, flag", [
    ("best", "--eval_interval=6"),   # ckpt.pt would be the same file
    ("ckpt", "--checkpoint_interval=1"),
])
def test_full_disk_leaves_the_previous_checkpoint_whole(name, flag):
    train.main([*TINY, "--max_iters=6"])
    before = Path("out/ckpt.pt").read_bytes()
    Path(f"out/{name}.pt.tmp").symlink_to("/dev/full")
    fails(train, *TINY, "--init_from=resume", flag, match=f"cannot save out.{name}.pt .*untouched")
    assert Path("out/ckpt.pt").read_bytes() == Path("out/best.pt").read_bytes() == before
    assert checkpoint()["step"] == 6


def test_cause_of_an_error_while_saving_is_named_where_torch_hides_it():
    def write():
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 64 vs 0")   # what torch makes of it  # noqa: B904
    with pytest.raises(InputError, match="cannot save x .*No space left"), as_save_error("x"):
        write()


def test_output_whose_reader_has_ended_goes_nowhere():
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", encoding="utf-8", buffering=1) as broken:
        stream = Unbreakable(broken)
        print("unseen", file=stream, flush=True)
        print("unseen", file=stream, flush=True)


def test_output_is_as_before_when_a_script_has_ended():
    before = sys.stdout
    run_script(lambda argv: print("seen"), needs_reader=False)
    assert sys.stdout is before


# ------------------------------------------------------------------------------------------------
# Numbers that are not finite

def infinite_loss(model):
    return float("inf")


def infinite_slope(model):
    """Zero, but its gradient is not finite: the square root has a vertical tangent there."""
    difference = model.ln_f.weight - model.ln_f.weight.detach()
    return difference.abs().sqrt().sum()


@pytest.mark.parametrize("flags", [[], ["--checkpoint_interval=1"]])
@pytest.mark.parametrize("added, what", [
    (infinite_loss, "loss inf"),
    (infinite_slope, "(loss|gradient norm) nan"),   # the next loss is nan, too
])
def test_run_stops_before_it_overwrites_anything(added, what, flags, monkeypatch):
    train.main([*TINY, "--max_iters=6"])
    before = {path: path.read_bytes() for path in Path("out").glob("*.pt")}
    forward = GPT.forward

    def faulty_forward(self, *args, **options):
        logits, loss = forward(self, *args, **options)
        if self.training:
            loss = loss + added(self)
        return logits, loss
    monkeypatch.setattr(GPT, "forward", faulty_forward)
    fails(train, *TINY, "--init_from=resume", *flags, match=f"step [79]: {what}")
    assert before == {path: path.read_bytes() for path in Path("out").glob("*.pt")}


# ------------------------------------------------------------------------------------------------
# Signals

@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_finishes_the_step_saves_and_exits_0(number):
    process = start(*TINY, "--max_iters=1000000", "--eval_interval=1000000",
                    "--checkpoint_interval=1000000")
    read_until(process, "| loss")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in err
    assert err.endswith("finishing this step; Ctrl-C once more stops at once\n")
    assert out.splitlines()[-1].endswith("--checkpoint_interval=1000000 --init_from=resume")
    assert checkpoint()["step"] > 0


def test_signal_before_the_first_step_leaves_nothing_to_resume(monkeypatch, capsys):
    install = signal.signal
    installed = []

    def install_and_raise(number, handler):
        before = install(number, handler)
        installed.append(number)
        if len(installed) == 2:   # both are installed, the last thing before the loop
            signal.raise_signal(signal.SIGINT)
        return before
    monkeypatch.setattr(signal, "signal", install_and_raise)
    train.main([*TINY, "--init_from=scratch"])
    assert set(installed[:2]) == {signal.SIGINT, signal.SIGTERM}
    assert not Path("out/ckpt.pt").exists()
    assert capsys.readouterr().out.splitlines()[-1].endswith("--init_from=scratch")


@needs_linux
def test_run_killed_twice_and_resumed_is_exact_to_the_bit():
    """kill -9 at a random moment of the training"""
    flags = [*TINY, "--max_iters=200", "--dropout=0.1", "--checkpoint_interval=1",
             "--eval_interval=50", "--log_interval=50"]
    train.main([*flags, "--out_dir=whole"])
    for _ in range(2):
        process = start(*flags, "--init_from=auto")
        read_until(process, "step ")
        time.sleep(0.4 * random.random())
        process.kill()
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
    train.main([*flags, "--init_from=auto"])
    assert same_state(Path("out"), Path("whole"))
    assert val_losses() == val_losses("whole/metrics.csv")


# ------------------------------------------------------------------------------------------------
# The command line

@pytest.mark.parametrize("script, argv", [
    ("train.py", ["--n_laye=3"]),
    ("sample.py", ["--out_dir=nowhere"]),
    ("prepare_data.py", ["nothing"]),
])
def test_command_line_prints_one_line_and_no_traceback(script, argv):
    process = start(*argv, script=script)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    lines = [line for line in err.splitlines() if not line.startswith("device:")]
    assert len(lines) == 1 and lines[0].startswith("error: "), err


def test_report_to_torchrun_appears_whole(monkeypatch):
    seen = []
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "error.json")
    # fsync is called once all is written: nothing may be shown yet
    monkeypatch.setattr(os, "fsync", lambda fd: seen.append(Path("error.json").exists()))
    report("what went wrong")
    assert seen == [False]
    message = json.loads(Path("error.json").read_text())["message"]["message"]
    assert message == "what went wrong"


@pytest.mark.parametrize("argv", [
    ["a.py", "--seed=1"],
    ["--init_from=auto", "a.py", "--seed=1"],
    ["a.py", "--init_from", "gpt2", "--seed=1", "--init_from=resume"],
])
def test_resume_command_asks_to_resume_once(argv):
    assert reporting.without_init_from(argv) == ["a.py", "--seed=1"]


# ------------------------------------------------------------------------------------------------
# Files that were damaged, or made to do damage

def state_of(path):
    saved = checkpoint(path)
    return saved, saved["optimizer"]["h.0.attn.c_attn.weight"]


@pytest.mark.parametrize("key, value", [
    ("exp_avg", torch.zeros(1)),
    ("exp_avg", torch.zeros(48, 16, dtype=torch.float64)),
    ("exp_avg", torch.zeros(16, 48).T),
    ("exp_avg_sq", torch.zeros(48, 16).to_sparse()),
    ("step", torch.zeros(2)),
    ("step", 3.0),
    ("more", torch.zeros(48, 16)),
])
def test_state_of_an_optimizer_that_would_write_out_of_bounds_is_refused(key, value):
    train.main([*TINY, "--max_iters=6"])
    saved, state = state_of("out/ckpt.pt")
    state[key] = value
    torch.save(saved, "out/ckpt.pt")
    fails(train, *TINY, "--init_from=resume", match="ckpt.pt: the optimizer's state of .* broken")


def test_every_flipped_byte_of_a_checkpoint_is_noticed():
    train.main([*TINY, "--max_iters=6"])
    raw = Path("out/ckpt.pt").read_bytes()
    rng = random.Random(1)
    Path("out/best.pt").unlink()
    for _ in range(40):
        place = rng.randrange(len(raw))
        Path("out/ckpt.pt").write_bytes(raw[:place] + bytes([raw[place] ^ 64]) + raw[place + 1:])
        try:
            found = checkpoint_read("out/ckpt.pt")
        except InputError:
            continue
        Path("whole.pt").write_bytes(raw)   # it was in the padding between the tensors
        assert same_weights(found, checkpoint_read("whole.pt")), place


@pytest.mark.parametrize("field, value", [
    ("n_layer", 10**6), ("n_layer", 10**12), ("n_embd", 10**6), ("vocab_size", 10**9),
    ("block_size", 10**9),
])
def test_configuration_of_a_giant_beside_small_weights_is_refused_at_once(field, value):
    train.main([*TINY, "--max_iters=6"])
    GPT.from_pretrained("out").save_pretrained("exported")
    saved = checkpoint("out/best.pt")
    saved["gpt_config"][field] = value
    torch.save(saved, "out/best.pt")
    fails(sample, "--out_dir=out", match=f"best.pt: its tensors are not .*{field}={value}")

    name = {"n_layer": "n_layer", "n_embd": "n_embd", "vocab_size": "vocab_size",
            "block_size": "n_positions"}[field]
    config = json.loads(Path("exported/config.json").read_text())
    config |= {name: value, "n_inner": None}
    Path("exported/config.json").write_text(json.dumps(config))
    fails(sample, "--init_from=exported", match="exported: its tensors are not those of a model")


@pytest.mark.parametrize("name, tensor", [
    ("wte.weight", torch.zeros(17, 16).to_sparse()),
    ("wte.weight", torch.zeros(17, 16, device="meta")),
    ("wte.weight", torch.quantize_per_tensor(torch.zeros(17, 16), 1.0, 0, torch.qint8)),
    ("wte.weight", torch.zeros(17, 16, dtype=torch.complex64)),
], ids=["sparse", "meta", "quantized", "complex"])
def test_tensors_of_other_kinds_are_refused(name, tensor):
    train.main([*TINY, "--max_iters=6"])
    saved = checkpoint("out/best.pt")
    saved["model"][name] = tensor
    torch.save(saved, "out/best.pt")
    fails(sample, "--out_dir=out", match="best.pt")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows keeps files from being replaced")
def test_second_run_in_a_folder_is_refused_and_a_later_one_is_not():
    with locked(Path("out")):
        fails(train, *TINY, match="out_dir=out: another run writes there")
        assert not list(Path("out").iterdir())
    train.main([*TINY, "--max_iters=1"])
    train.main([*TINY, "--max_iters=1"])


def test_token_file_that_is_cut_during_the_run_ends_it(monkeypatch):
    step = train.train_step

    def cut(*args):
        os.truncate("data/tiny/train.bin", 100)
        return step(*args)
    monkeypatch.setattr(train, "train_step", cut)
    fails(train, *TINY, match="train.bin has become shorter")


# ------------------------------------------------------------------------------------------------
# Preparing data over data

def test_old_description_does_not_survive_new_token_files(monkeypatch):
    """Killed between the two, prepare_data leaves a folder that says that it is incomplete."""
    def killed(*args, **options):
        raise KeyboardInterrupt
    monkeypatch.setattr(prepare_data, "write_meta", killed)
    Path("new.txt").write_text("another text, of other characters " * 90)
    with pytest.raises(KeyboardInterrupt):
        prepare_data.main(["--input", "new.txt", "--name", "tiny"])
    fails(train, *TINY, match="data/tiny has .bin files but no meta.json")


def test_input_that_would_be_overwritten_is_refused():
    before = Path("data/tiny/train.bin").read_bytes()
    fails(prepare_data, "--input", "data/tiny/train.bin", "--name", "tiny",
          match="train.bin would be overwritten")
    assert Path("data/tiny/train.bin").read_bytes() == before
    assert Path("data/tiny/meta.json").exists()


# ------------------------------------------------------------------------------------------------
# Config files and outputs

@pytest.mark.parametrize("source, match", [
    ("learning_rate = lambda step: 1e-3", "own.py: learning_rate=<function .* is of type function"),
    ("n_layer = int", "own.py: n_layer=<class 'int'> is of type type"),
    ("import math as seed", "own.py: seed=<module 'math'.* is of type module"),
    ("raise BaseException('no')", "own.py, line 1: BaseException: no"),
    ("raise GeneratorExit", "own.py, line 1: GeneratorExit"),
])
def test_settings_that_are_no_plain_values_are_refused(source, match):
    Path("own.py").write_text(source)
    fails(train, *TINY, "own.py", match=match)


@pytest.mark.skipif(sys.platform == "win32", reason="pipes differ there")
def test_training_goes_on_when_nobody_reads_its_output():
    process = start(*TINY, "--log_interval=1")
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=100) == 0 and process.stderr.read() == ""
    assert checkpoint()["step"] == 12


@pytest.mark.skipif(sys.platform == "win32", reason="signals differ there")
@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.1 * tenth for tenth in range(1, 21)])
@pytest.mark.parametrize("script, argv", [
    ("train.py", [*TINY, "--max_iters=100000", "--eval_interval=100000", "--log_interval=100000"]),
    ("sample.py", ["--out_dir=out", "--max_new_tokens=1000000"]),
    ("prepare_data.py", ["--input", "text.txt", "--name", "x"]),
])
def test_Ctrl_C_at_any_moment_is_one_line(script, argv, seconds):
    train.main([*TINY, "--max_iters=1"])
    Path("text.txt").write_text("many words " * 10**7)
    process = start(*argv, script=script)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=100)
    lines = [line for line in err.splitlines() if not line.startswith("device:")]
    assert len(lines) == 1 and "Traceback" not in err, err


# ------------------------------------------------------------------------------------------------
# What was a traceback once

@pytest.mark.parametrize("argv, match", [
    (["--n_layer=99999999999"], "n_layer=99999999999 must be a positive integer below"),
    (["--block_size=9223372036854775808"], "block_size=9223372036854775808 must be"),
    (["--max_iters=1e999"], "max_iters=inf is of type float"),
    (["--learning_rate=nan"], "learning_rate='nan' is of type str"),
    (["--use_rope", "--rope_theta=1e999"], "rope_theta=inf must be"),
    (["--out_dir=a\0b"], "out_dir=.*null"),
    (["--out_dir=a\ud800"], "'--out_dir=a.*' is not UTF-8"),
    (["--out_dir=a\udcff"], "'--out_dir=a.*' is not UTF-8"),   # the byte 0xff
])
def test_numbers_and_names_beyond_all_bounds_are_one_clear_line(argv, match):
    fails(train, *TINY, *argv, match=match)


def test_exception_that_cannot_even_be_printed_is_one_clear_line():
    Path("own.py").write_text("class E(Exception):\n    __str__ = None\nraise E\n")
    fails(train, "own.py", match="own.py, line 3: E:")


@pytest.mark.parametrize("change, match", [
    ({"dtype": "float32"}, "is broken"),
    ({"dtype": "int16"}, "is broken"),
    ({"train": {"train.bin": 2448.0}}, "is broken"),
    ({"train": {"../tiny/train.bin": 2448}}, "is broken"),
    ({"train": {"val.bin": 2448}}, "is broken"),   # the validation file again
    ({"header_bytes": "many"}, "is broken"),
    ({"tokenizer": {"kind": "char", "chars": "aa"}}, "is broken|unknown tokenizer"),
    ({"tokenizer": {"kind": "bpe", "vocab": {}}}, "is broken|tokenizer"),
])
def test_meta_json_that_cannot_be_is_one_clear_line(change, match):
    path = Path("data/tiny/meta.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    fails(train, *TINY, match=match)


def test_json_that_is_too_deep_is_one_clear_line():
    Path("data/tiny/meta.json").write_text("[" * 100_000)
    fails(train, *TINY, match="meta.json is broken")


@pytest.mark.parametrize("key, value", [
    ("step", -1), ("tokenizer", {"kind": "word"}), ("gpt_config", {"n_layer": "two"}),
    ("gpt_config", {"n_layer": 2, "legs": 4}), ("model", {"wte.weight": [1.0]}),
])
def test_checkpoint_with_values_of_other_kinds_is_one_clear_line(key, value):
    train.main([*TINY, "--max_iters=6"])
    saved = checkpoint("out/best.pt")
    saved[key] = value
    torch.save(saved, "out/best.pt")
    fails(sample, "--out_dir=out", match="best.pt|tokenizer")


def test_weights_that_are_not_numbers_are_one_clear_line():
    train.main([*TINY, "--max_iters=6"])
    saved = checkpoint("out/best.pt")
    saved["model"]["ln_f.weight"].fill_(float("nan"))
    torch.save(saved, "out/best.pt")
    fails(sample, "--out_dir=out", match="not finite: its weights are damaged")


def test_file_of_weights_is_answered_with_its_folder():
    Path("weights").mkdir()
    Path("weights/model.safetensors").touch()
    fails(sample, "--init_from=weights/model.safetensors", match="give its folder")


@pytest.mark.parametrize("cell", ["x", "1e", "nan", "--"])
def test_metrics_with_cells_that_do_not_parse_do_not_stop_a_good_checkpoint(cell):
    train.main([*TINY, "--max_iters=6"])
    path = Path("out/metrics.csv")
    path.write_text(path.read_text() + f"6,192,,,,,,{cell}\n")
    train.main([*TINY, "--init_from=resume"])
    assert checkpoint()["step"] == 12


@pytest.mark.parametrize("name, value", [
    ("RANK", "x"), ("WORLD_SIZE", "many"), ("MASTER_PORT", "door"),
])
def test_environment_of_nonsense_is_one_clear_line(name, value, monkeypatch):
    environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for key, good in (environment | {name: value}).items():
        monkeypatch.setenv(key, good)
    fails(train, *TINY, match="how to meet the other processes")


@pytest.mark.parametrize("flag", ["--temperature=1e-320", "--top_p=1e-320"])
def test_sampling_with_numbers_that_vanish_is_one_clear_line(flag):
    train.main([*TINY, "--max_iters=1"])
    fails(sample, "--out_dir=out", flag, match=flag.removeprefix("--").split("=")[0])
