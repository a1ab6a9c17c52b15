"""train.py: what it computes, what it prints, and what it leaves."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch
from helpers import SWITCHES, TINY, checkpoint, fails, ids, rows, same_weights, val_losses
from torch.nn import functional as F

import sample
import train
from model import GPT, GPTConfig
from plumbing.token_files import Data, load_meta
from train import TrainConfig, load_config

pytestmark = pytest.mark.usefixtures("short_sample")
RUN_FILES = ["best.pt", "ckpt.pt", "metrics.csv"]


def names_in(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def tiny_data(split, seed=1337):
    return Data(Path("data/tiny"), load_meta("data/tiny"), split, 8, seed)


def model_of(saved):
    model = GPT(GPTConfig(**saved["gpt_config"]))
    model.load_state_dict(saved["model"])
    return model


# ------------------------------------------------------------------------------------------------
# What a run leaves

def test_run_prints_its_course_a_curve_a_sample_and_the_next_command(capsys):
    train.main(TINY)
    out = capsys.readouterr().out
    assert out.startswith("device: cpu (as asked), float32 (as asked)")
    assert "batch: 4 sequences = 1 accumulation step(s) x 4 x 1 process; 32 tokens" in out
    assert "step 3/12 | loss" in out and "tokens/s" in out
    assert "step 12: validation loss" in out
    assert "█" in out
    assert out.splitlines()[-1].endswith("python sample.py --out_dir=out")


def test_run_leaves_two_checkpoints_and_metrics():
    train.main(TINY)
    assert names_in("out") == RUN_FILES
    table = rows()
    columns = "step,tokens,train_loss,val_loss,lr,grad_norm,tokens_per_s,elapsed_s"
    assert list(table[0]) == columns.split(",")
    trained = [row["step"] for row in table if row["train_loss"]]
    evaluated = [row["step"] for row in table if row["val_loss"]]
    assert trained == ["3", "6", "9", "12"] and evaluated == ["0", "6", "12"]
    assert [row["tokens"] for row in table if row["step"] == "12"] == ["384", "384"]
    assert val_losses()[-1] < val_losses()[0]


def test_checkpoint_holds_plain_names_and_all_that_sampling_needs():
    train.main(TINY)
    saved = checkpoint()
    assert saved.keys() == {"model", "optimizer", "gpt_config", "train_config", "step",
                            "best_val_loss", "tokenizer", "source_sha256"}
    model = model_of(saved)
    assert saved["optimizer"].keys() == dict(model.named_parameters()).keys()
    assert saved["train_config"] == dataclasses.asdict(load_config(TINY)[0])
    meta = load_meta("data/tiny")
    assert saved["tokenizer"] == meta["tokenizer"]
    assert saved["source_sha256"] == meta["source_sha256"]
    assert saved["step"] == 12


def test_best_is_kept_apart_from_last():
    train.main([*TINY, "--max_iters=24"])
    best = checkpoint("out/best.pt")
    lowest = min(val_losses())
    ruin = ["--learning_rate=3", "--min_lr=3", "--max_iters=36"]
    train.main([*TINY, "--init_from=resume", *ruin])
    assert val_losses()[-1] > lowest
    assert same_weights(best, checkpoint("out/best.pt"))
    assert not same_weights(best, checkpoint())
    assert checkpoint()["best_val_loss"] == pytest.approx(lowest, abs=1e-5)


def test_checkpoints_come_after_so_many_steps_or_so_many_minutes(monkeypatch):
    replace = os.replace
    steps = []

    def note_and_replace(source, target):
        if Path(target) == Path("out/ckpt.pt"):
            steps.append(checkpoint(source)["step"])
        replace(source, target)
    monkeypatch.setattr(os, "replace", note_and_replace)

    def saved_at(*flags):
        steps.clear()
        train.main([*TINY, "--eval_interval=100", *flags])
        return list(steps)
    assert saved_at() == [12]
    assert saved_at("--checkpoint_interval=5") == [5, 10, 12]
    assert saved_at("--checkpoint_minutes=0") == list(range(1, 13))


def test_run_from_scratch_keeps_what_an_earlier_run_left(capsys):
    train.main(TINY)
    first = checkpoint()
    for n in (1, 2):
        train.main([*TINY, f"--seed={n}"])
        assert names_in(f"out/old{n}") == RUN_FILES
        assert str(Path("out", f"old{n}")) in capsys.readouterr().out
    assert same_weights(checkpoint("out/old1/ckpt.pt"), first)
    assert not same_weights(checkpoint("out/old2/ckpt.pt"), first)


def test_eval_only_prints_the_loss_and_touches_nothing(capsys):
    train.main(TINY)
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    train.main([*TINY, "--init_from=resume", "--eval_only"])
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert f"validation loss {val_losses()[-1]:.4f}" in last_line
    assert before == {path: path.read_bytes() for path in Path("out").iterdir()}


# ------------------------------------------------------------------------------------------------
# Loss, gradient, schedule

def test_validation_loss_is_the_mean_over_the_whole_split():
    train.main([*TINY, "--eval_iters=1000", "--batch_size=5", "--micro_batch_size=5"])
    val = torch.tensor(ids("val"))
    n = (len(val) - 1) // 8   # written out anew; batches of 5 leave none of 33 windows out
    logits, _ = model_of(checkpoint()).eval()(val[:n * 8].view(n, 8))
    expected = F.cross_entropy(logits.flatten(0, 1), val[1:n * 8 + 1]).item()
    assert val_losses()[-1] == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("micro", [1, 3, 4, 7])
def test_validation_loss_does_not_depend_on_the_micro_batch(micro):
    torch.manual_seed(0)
    model = GPT(GPTConfig(8, 17, 1, 2, 16))
    data = tiny_data("val")
    c = TrainConfig(batch_size=84, eval_iters=1)

    def loss(micro):
        place = train.Place(torch.device("cpu"), bf16=False, rank=0, world=1, micro=micro)
        return train.evaluate(model, data, c, place)
    assert loss(micro) == pytest.approx(loss(84), rel=1e-6)


def test_accumulation_changes_nothing_but_rounding():
    train.main([*TINY, "--out_dir=whole"])
    train.main([*TINY, "--out_dir=parts", "--micro_batch_size=1"])
    for a, b in zip(rows("whole/metrics.csv"), rows("parts/metrics.csv"), strict=True):
        for key in ("train_loss", "val_loss", "grad_norm"):
            assert a[key] == b[key] or float(a[key]) == pytest.approx(float(b[key]), rel=1e-4)


def test_first_step_equals_one_written_out_by_hand():
    """Loss, clipping, decay of matrices only, AdamW: against torch's own pieces, not train.py's."""
    flags = ["--max_iters=1", "--weight_decay=0.5", "--grad_clip=0.1", "--warmup_iters=0"]
    train.main([*TINY, *flags])
    torch.manual_seed(1337)
    model = GPT(GPTConfig(8, 17, 2, 2, 16))
    x, y = tiny_data("train").batch(range(4))
    model(x, y)[1].backward()
    norm = torch.sqrt(sum((p.grad ** 2).sum() for p in model.parameters()))
    row = next(row for row in rows() if row["grad_norm"])
    assert float(row["grad_norm"]) == pytest.approx(norm.item(), rel=1e-4)
    assert norm > 0.1   # so that clipping takes part

    saved = checkpoint()["model"]
    for name, p in model.named_parameters():
        g = p.grad * 0.1 / norm
        decayed = p * (1 - 1e-2 * 0.5) if p.dim() == 2 else p
        # in AdamW's first step both averages, once corrected, are g and g * g
        expected = decayed - 1e-2 * g / (g.abs() + 1e-8)
        assert torch.allclose(saved[name], expected, atol=2e-6), name


def test_learning_rate_warms_up_and_follows_a_cosine():
    c = TrainConfig(learning_rate=1.0, min_lr=0.2, warmup_iters=10, lr_decay_iters=110)
    rates = [train.lr_at(step, c) for step in (0, 9, 10, 60, 110, 150)]
    assert rates == pytest.approx([1 / 11, 10 / 11, 1.0, 0.6, 0.2, 0.2])


def test_learning_rate_ends_at_a_tenth_after_the_last_step_unless_told_otherwise():
    c = TrainConfig(learning_rate=1.0, warmup_iters=0, max_iters=200)
    assert train.lr_at(0, c) == 1.0
    assert train.lr_at(200, c) == pytest.approx(0.1)


def test_dropout_is_drawn_anew_at_every_step(monkeypatch):
    forward = GPT.forward
    states = []

    def note_and_forward(self, *args, **options):
        if self.training:
            states.append(torch.get_rng_state().numpy().tobytes())
        return forward(self, *args, **options)
    monkeypatch.setattr(GPT, "forward", note_and_forward)
    train.main([*TINY, "--dropout=0.2", "--max_iters=6"])
    assert len(states) == len(set(states)) == 6


# ------------------------------------------------------------------------------------------------
# Muon (tests/test_muon.py has its arithmetic)

def test_muon_moves_the_matrices_inside_the_blocks_and_adamw_the_rest():
    model = GPT(GPTConfig(8, 17, 1, 2, 16))
    c = TrainConfig(optimizer="muon", beta1=0.8)
    adamw, muon = train.make_optimizers(model, c, torch.device("cpu"))
    names = {p: name for name, p in model.named_parameters()}

    def moved_by(optimizer):
        return {names[p] for group in optimizer.param_groups for p in group["params"]}
    matrices = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert moved_by(muon) == {f"h.0.{name}.weight" for name in matrices}
    assert moved_by(adamw) == set(names.values()) - moved_by(muon)
    assert muon.param_groups[0]["momentum"] == 0.8
    assert adamw.param_groups[0]["betas"][0] == 0.8


def test_muon_steps_nearly_as_far_in_every_direction_and_as_far_as_adamw():
    model = GPT(GPTConfig(8, 17, 1, 2, 16))
    c = TrainConfig(optimizer="muon", learning_rate=0.1, weight_decay=0.0)
    _, muon = train.make_optimizers(model, c, torch.device("cpu"))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    W = model.h[0].attn.c_proj.weight
    W.grad = torch.diag(10.0 ** torch.arange(0, -1, -1 / 16))   # from 1 down to nearly a tenth
    before = W.detach().clone()
    muon.step()
    lengths = torch.linalg.svdvals(before - W.detach())
    adamw_length = 0.1 * 0.2 * 16**0.5   # learning rate, AdamW's usual RMS, width
    assert lengths.min() > 0.5 * adamw_length
    assert lengths.max() < 1.5 * adamw_length


def test_learning_rate_reaches_both_optimizers():
    def weights(*flags):
        one_step = ["--warmup_iters=0", "--max_iters=1", "--min_lr=0"]
        train.main([*TINY, "--optimizer=muon", *one_step, *flags])
        return checkpoint()["model"]
    start = weights("--learning_rate=0")
    moved = weights("--learning_rate=1e-2")
    ended = weights("--learning_rate=1e-2", "--lr_decay_iters=0")   # min_lr from the first step
    for name in ("wte.weight", "h.0.mlp.c_fc.weight"):
        assert not torch.equal(start[name], moved[name])
        assert torch.equal(start[name], ended[name])


# ------------------------------------------------------------------------------------------------
# Variants

def test_bf16_trains_too():
    train.main([*TINY, "--dtype=bfloat16", "--max_iters=6"])
    assert val_losses()[-1] < val_losses()[0]


def test_compile_that_fails_falls_back_and_says_why(monkeypatch, capsys):
    def broken(function):
        raise RuntimeError("no compiler\non this machine")
    monkeypatch.setattr(torch, "compile", broken)
    train.main([*TINY, "--compile=True"])
    out = capsys.readouterr().out
    assert "torch.compile failed, " in out and ": RuntimeError: no compiler" in out
    assert checkpoint()["step"] == 12


def test_all_switches_train_resume_and_sample():
    flags = [*TINY, *SWITCHES]
    train.main([*flags, "--out_dir=whole"])
    train.main([*flags, "--max_iters=6", "--lr_decay_iters=12"])
    train.main([*flags, "--init_from=resume"])
    assert same_weights(checkpoint(), checkpoint("whole/ckpt.pt"))
    assert checkpoint()["gpt_config"]["window_size"] == 3
    sample.main(["--out_dir=out", "--max_new_tokens=50", "--device=cpu"])
    GPT.from_pretrained("out").save_pretrained("exported")
    assert '"starcoder2"' in Path("exported/config.json").read_text()


def test_switch_that_the_checkpoint_lacks_is_refused():
    train.main(TINY)
    fails(train, *TINY, "--init_from=resume", "--use_rope",
          match="another architecture: use_rope is False.* not True")
