"""
One process, DDP and FSDP are one training: the same losses, the same checkpoints, the same last
words. Gloo on this machine's CPU, started by torchrun as a user would. every_mode.py has the runs.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from every_mode import MODES
from helpers import (
    HERE,
    LONGER,
    PROGRAMS,
    TINY,
    checkpoint,
    fails,
    finish,
    prepare_tiny,
    same_course,
    same_state,
    start_machines,
    torchrun,
    val_losses,
    without,
)

import sample
import train
from model import GPT
from train import load_config

# ------------------------------------------------------------------------------------------------
# Equal courses, equal checkpoints

@pytest.mark.parametrize("mode", ["one1", "ddp1", "ddp3", "fsdp1", "fsdp3", "fsdp-recomputed"])
def test_every_mode_gives_the_losses_and_gradient_norms_of_one_process(modes, mode):
    folder, n = modes
    same_course(folder / "one3", folder / mode)


@pytest.mark.parametrize("mode", ["ddp3", "fsdp3"])
def test_every_mode_gives_them_with_muon_too_and_resumes_to_the_bit(modes, mode):
    folder, n = modes
    same_course(folder / "one3-muon", folder / f"{mode}-muon")
    assert same_state(folder / f"{mode}-muon", folder / f"{mode}-muon-resumed")


def test_muon_is_not_adamw(modes):
    folder, n = modes
    assert val_losses(folder / "one3-muon/metrics.csv") != val_losses(folder / "one3/metrics.csv")


@pytest.mark.parametrize("start", MODES)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_continues_from_a_checkpoint_of_every_other(modes, mode, start):
    folder, n = modes
    same_course(folder / start, folder / f"{mode}-from-{start}", after=9)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_resumes_its_own_checkpoint_to_the_bit(modes, mode):
    folder, n = modes
    assert same_state(folder / mode, folder / f"{mode}-from-{mode}")


def test_FSDP_in_bf16_keeps_its_weights_in_float32_and_resumes_to_the_bit(modes):
    folder, n = modes
    saved = checkpoint(folder / "fsdp3-bf16/ckpt.pt")
    assert all(t.dtype == torch.float32 for t in saved["model"].values())
    assert same_state(folder / "fsdp3-bf16", folder / "fsdp3-bf16-resumed")
    assert not same_state(folder / "fsdp3-bf16", folder / "fsdp3")
    bf16 = val_losses(folder / "fsdp3-bf16/metrics.csv")[-1]
    exact = val_losses(folder / "fsdp3/metrics.csv")[-1]
    assert bf16 == pytest.approx(exact, rel=1e-2)


@pytest.mark.parametrize("mode", ["ddp3", "fsdp3"])
def test_checkpoints_of_all_modes_are_alike_and_open_everywhere(modes, mode):
    folder, n = modes
    plain = checkpoint(folder / "one3/ckpt.pt")
    saved = checkpoint(folder / mode / "ckpt.pt")
    assert saved.keys() == plain.keys()
    assert saved["optimizer"].keys() == plain["optimizer"].keys()
    assert saved["model"].keys() == plain["model"].keys()
    for name, t in saved["model"].items():
        assert type(t) is torch.Tensor and t.shape == plain["model"][name].shape
    GPT.from_pretrained(folder / mode).save_pretrained("exported")
    sample.main([f"--out_dir={folder / mode}", "--max_new_tokens=5", "--device=cpu"])


# ------------------------------------------------------------------------------------------------
# Speaking, meeting, agreeing

@pytest.fixture(scope="module")
def run_of_two(tmp_path_factory):
    """A run of two processes with DDP, whose config file says another thing to each of them"""
    folder = tmp_path_factory.mktemp("run_of_two")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        prepare_tiny()
        Path("own.py").write_text("import os\nweight_decay = 3.0 * int(os.environ['RANK'])")
        process = torchrun(HERE / "train.py", *TINY, "--log_interval=1", "own.py")
        out, ours = finish(process)
    assert process.returncode == 0 and not ours, process.err
    return folder, out


def test_only_rank_0_speaks_and_all_agree_on_the_batch(run_of_two):
    folder, out = run_of_two
    assert "batch: 4 sequences = 1 accumulation step(s) x 2 x 2 processes; 32 tokens" in out
    for line in ("device: cpu", "step 12: validation loss", "python sample.py --out_dir=out"):
        assert out.count(line) == 1


def test_settings_of_rank_0_are_those_of_all(run_of_two):
    """Copies of the model that decayed apart would drift apart, and the losses with them."""
    folder, out = run_of_two
    assert checkpoint(folder / "out/ckpt.pt")["train_config"]["weight_decay"] == 0.0
    train.main([*TINY, "--log_interval=1", "--weight_decay=0", "--out_dir=alone"])
    same_course(Path("alone"), folder / "out")


@pytest.mark.slow
def test_two_launches_meet_as_two_machines_with_disks_of_their_own():
    for machine in ("a", "b"):
        Path(machine).mkdir()
        shutil.copy("text.txt", machine)
    both = start_machines(PROGRAMS / "slow_preparation.py", *LONGER, n=1, folders=("a", "b"))
    assert [process.returncode for process in both] == [0, 0], both[0].err + both[1].err
    first = "a" if "python sample.py --out_dir=out" in both[0].out else "b"
    second = "b" if first == "a" else "a"
    assert Path(first, "prepared.txt").read_text() == "0"
    assert Path(second, "prepared.txt").read_text() == "1"   # each machine has data of its own
    assert not Path(second, "out").exists()
    train.main([*LONGER, "--out_dir=alone"])
    same_course(Path("alone"), Path(first, "out"))


def test_fsdp_without_torchrun_names_the_right_command():
    match = "torchrun --standalone --nproc_per_node=2 train.py --dataset=tiny .*--fsdp"
    fails(train, *TINY, "--fsdp", match=match)


@pytest.mark.slow
def test_missing_dataset_is_prepared_by_one_while_the_others_wait():
    shutil.rmtree("data/tiny")
    process = torchrun(PROGRAMS / "slow_preparation.py", *TINY)
    finish(process)
    assert process.returncode == 0, process.err
    assert Path("prepared.txt").read_text() == "0"
    assert checkpoint()["step"] == 12


@pytest.mark.slow
def test_first_command_works_without_network(library):
    flags = [str(HERE / "config/shakespeare.py"), "--out_dir=out", *without(TINY, "dataset")]
    process = torchrun(PROGRAMS / "first_command.py", *flags)
    out, ours = finish(process)
    assert process.returncode == 0 and not ours, process.err
    assert out.count(str(Path("data/shakespeare/input.txt"))) == 2   # at the start, at the end
    assert checkpoint()["train_config"]["dataset"] == "stdlib"
    assert checkpoint()["step"] == 12


# ------------------------------------------------------------------------------------------------
# What it costs

def held(n, *flags):
    """The bytes that each of n processes keeps: a list of dicts, by rank"""
    process = torchrun("assessment.held", *LONGER, *flags, n=n, options=("--standalone", "-m"))
    out, _ = finish(process)
    assert process.returncode == 0, process.err
    found = re.findall(r"\{[^}]*\}", out)   # torchrun's Python writes a line and its end apart
    return sorted(map(json.loads, found), key=lambda part: part["rank"])


def held_by_one_process():
    """What a process holds that has everything, in bytes"""
    model = GPT(load_config([*LONGER, "--vocab_size=17"])[1])
    whole = 4 * model.num_params()
    steps = 4 * len(list(model.parameters()))   # AdamW counts the steps of each tensor in a float
    return {"parameters": whole, "gradients": whole, "optimizer": 2 * whole + steps}


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
def test_with_DDP_each_process_holds_everything(n):
    assert held(n) == [{"rank": rank, **held_by_one_process()} for rank in range(n)]


@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_with_FSDP_each_process_holds_one_part_of_N(n):
    fsdp = held(n, "--fsdp")
    assert [part["rank"] for part in fsdp] == list(range(n))
    for part in fsdp:
        for key, size in held_by_one_process().items():
            assert part[key] == pytest.approx(size / n, rel=0.1)   # 17 rows are not shared evenly


def test_gradients_are_sent_once_per_step_however_many_parts_it_has():
    process = torchrun(PROGRAMS / "count_messages.py", *TINY, "--micro_batch_size=1")
    finish(process)
    assert process.returncode == 0, process.err
    parameters = GPT.from_pretrained("out").num_params()
    for rank in (0, 1):   # 12 steps of 2 parts each
        assert Path(f"sent-{rank}").read_text().split() == 12 * [str(parameters)]


@pytest.mark.slow
@pytest.mark.parametrize("n_embd", [16, 512])   # 512: enough for DDP to need several buckets
@pytest.mark.parametrize("recompute", [[], ["--checkpoint_activations"]])
@pytest.mark.parametrize("mode", ["alone", "ddp", "fsdp"])
def test_compile_in_every_mode_compiles_and_changes_nothing_but_rounding(mode, recompute, n_embd):
    shape = [*LONGER, f"--n_embd={n_embd}", "--max_iters=10", "--learning_rate=3e-4"]
    flags = [*shape, *recompute, "--compile=True"]
    if mode == "fsdp":
        flags.append("--fsdp")
    process = torchrun(PROGRAMS / "count_graphs.py", *flags, n=1 if mode == "alone" else 2)
    out, _ = finish(process, timeout=900)
    assert process.returncode == 0 and "torch.compile: the first steps" in out, process.err
    assert int(Path("graphs-0").read_text()) > 1   # more than the one that looks for a compiler
    train.main([*shape, "--out_dir=plain"])
    same_course(Path("out"), Path("plain"), rel=1e-4)
