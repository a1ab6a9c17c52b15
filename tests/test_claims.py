"""The claims of the assessment: what they compute beyond train.py, and how runs are kept."""

import math
import random
import re
from pathlib import Path

import pytest
import torch
from helpers import TINY, fails, needs_linux, without

import assessment.__main__
import train
from assessment import claims, measure, small_models, tables
from assessment.stretch import METHODS, frequencies, scores_and_mask, stretched, turn
from assessment.writing import text_quality
from model import GPT, GPTConfig
from plumbing.errors import InputError
from plumbing.run_folder import locked
from prepare_data import prepare_text

SHAPE = {"block_size": 64, "vocab_size": 17, "n_layer": 2, "n_head": 2, "n_embd": 32}


def rotary(**switches):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE, use_rope=True, use_gqa=True, n_kv_head=1, **switches)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


IDX = torch.randint(17, (2, 64), generator=torch.Generator().manual_seed(0))


def logits_of(model, method=None, s=4.0, trained=16):
    with torch.no_grad():
        if method is None:
            return model(IDX)[0]
        with stretched(method, s, trained):
            return model(IDX)[0]


def test_plain_is_the_attention_of_the_model_and_a_window_its_window():
    model = rotary()
    assert torch.allclose(logits_of(model, "plain"), logits_of(model), atol=1e-5)
    windowed = rotary(use_swa=True, window_size=16)
    assert torch.allclose(logits_of(model, "window"), logits_of(windowed), atol=1e-5)
    assert torch.equal(logits_of(model), logits_of(rotary()))   # nothing is left behind


def test_interpolation_divides_positions_and_ntk_is_another_theta():
    D, theta, s = 16, 10_000.0, 4.0
    plain = frequencies("plain", D, theta, s, 128)
    assert torch.allclose(frequencies("interpolation", D, theta, s, 128), plain / s)
    ntk = frequencies("ntk", D, theta, s, 128)
    assert ntk[0] == plain[0] == 1
    assert torch.allclose(ntk[-1], plain[-1] / s)


def test_yarn_keeps_fast_pairs_and_divides_slow_ones():
    D, theta, s, trained = 128, 10_000.0, 4.0, 2048
    plain, yarn = (frequencies(method, D, theta, s, trained) for method in ("plain", "yarn"))
    turns = trained * plain / (2 * math.pi)
    assert torch.equal(yarn[turns >= 32], plain[turns >= 32])
    assert torch.allclose(yarn[turns <= 1], plain[turns <= 1] / s)
    between = (turns > 1) & (turns < 32)
    assert ((yarn < plain) & (yarn > plain / s))[between].all() and between.any()


@pytest.mark.parametrize("method", METHODS)
def test_within_the_trained_length_nothing_changes(method):
    model = rotary()
    assert torch.allclose(logits_of(model, method, s=1.0, trained=64), logits_of(model), atol=1e-5)


@pytest.mark.parametrize("s", [1.0, 4.0])
def test_yarn_multiplies_the_scores_by_the_square_of_its_factor(s):
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 2, 8, 16)
    pos = torch.arange(8)
    scores, _ = scores_and_mask(q, k, pos, "yarn", 10_000.0, s, 128)
    freq = frequencies("yarn", 16, 10_000.0, s, 128)
    plain = turn(q, pos, freq) @ turn(k, pos, freq).mT / 4
    assert torch.allclose(scores, plain * (0.1 * math.log(s) + 1) ** 2)


def test_sinks_stand_at_the_windows_far_end_wherever_the_query_is():
    q, k = torch.randn(16).expand(1, 1, 64, 16), torch.randn(16).expand(1, 1, 64, 16)
    pos = torch.arange(64)
    scores, mask = scores_and_mask(q, k, pos, "sinks", 10_000.0, 4.0, 16)
    assert torch.allclose(scores[0, 0, 20:, :4], scores[0, 0, 15, :4].expand(44, 4), atol=1e-4)
    assert mask[63].nonzero().flatten().tolist() == [0, 1, 2, 3, *range(52, 64)]


def test_a_run_can_be_trained_while_attention_is_stretched():
    train.main([*TINY, "--use_rope", "--max_iters=1"])
    with stretched("yarn", 4.0, 8):
        train.main([*TINY, "--init_from=out", "--use_rope", "--max_iters=1", "--out_dir=new"])
    assert Path("new/ckpt.pt").exists()


def test_sinks_are_seen_from_everywhere():
    model = rotary()
    before = logits_of(model, "sinks")[:, -1]
    changed = IDX.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 17
    with torch.no_grad(), stretched("sinks", 4.0, 16):
        assert not torch.allclose(model(changed)[0][:, -1], before, atol=1e-4)
    one_layer = GPT(GPTConfig(**SHAPE | {"n_layer": 1}, use_rope=True)).eval()
    with torch.no_grad(), stretched("window", 4.0, 16):
        a, b = one_layer(IDX)[0][:, -1], one_layer(changed)[0][:, -1]
    assert torch.equal(a, b)   # without sinks, the first token is out of sight


def test_quality_of_texts_by_hand():
    found = text_quality(["x the cat the dog x", "x aaaa aaaa x"], {"the", "cat"})
    assert found["repetition"] == pytest.approx(2 / 6)   # the second "the", the second "aaaa"
    assert found["real words"] == pytest.approx(3 / 6)
    fours = [text[i:i + 4] for text in ("x the cat the dog x", "x aaaa aaaa x")
             for i in range(len(text) - 3)]
    assert found["distinct-4"] == len(set(fours)) / len(fours)


def test_a_word_is_repeated_if_it_is_one_of_the_ten_before_it():
    between = " b c d e f g h i j"
    assert text_quality([f"x a{between} a x"], set())["repetition"] == 1 / 11
    assert text_quality([f"x a{between} k a x"], set())["repetition"] == 0


def test_differences_are_paired_by_seed():
    mean, half = tables.difference({1: 1.0, 2: 2.1, 3: 3.2}, {1: 0.5, 2: 1.5, 3: 2.5})
    assert mean == pytest.approx(0.6)
    assert half == pytest.approx(4.303 * 0.1 / math.sqrt(3))   # t for 95% and 2 degrees of freedom


@pytest.mark.parametrize("how", ["mean", "first"])
def test_conversion_takes_the_mean_or_the_first_of_each_group(how):
    flags = without(TINY, "n_head")
    train.main([*flags, "--n_head=4", "--max_iters=1"])
    small_models.convert(Path("out"), Path("new"), how, 2)
    old, new = GPT.from_pretrained("out/ckpt.pt"), GPT.from_pretrained("new/best.pt")
    assert new.config.n_kv_head == 2
    for block, grouped in zip(old.h, new.h, strict=True):
        q, kv = block.attn.c_attn.weight.split([16, 32])
        heads = kv.view(2, 2, 2, 4, 16)   # key or value, group, its heads, D, C
        expected = heads.mean(dim=2) if how == "mean" else heads[:, :, 0]
        assert torch.allclose(grouped.attn.c_attn.weight, torch.cat([q, expected.flatten(0, 2)]))


def test_losses_at_all_lengths_are_of_the_same_64_characters(monkeypatch):
    places = torch.arange(1024)[None]
    seen = []

    class Sequences:
        def __init__(self, *args, **kwargs):
            pass

        def sequences(self, numbers):
            return places.clone(), places + 1

    def model(x, y):
        assert torch.equal(y[y != -1], torch.arange(961, 1025))
        seen.append(x.shape[1])
        return None, torch.tensor(2.0)
    monkeypatch.setattr(small_models, "Data", Sequences)
    monkeypatch.setattr(small_models, "load_meta", lambda folder: None)
    monkeypatch.setattr(GPT, "from_pretrained", lambda path, **changes: model)
    for T in small_models.LENGTHS:
        assert small_models.loss_at_length(Path("out"), "tiny", T) == 2.0
        assert set(seen) == {T}
        seen.clear()


def test_line_stands_twice_somewhere_in_the_context():
    rng = random.Random(0)
    begins = set()
    for n in 300 * [12, 24, 48]:
        text, start = small_models.line_in_context(n, rng)
        assert len(text) == 129 and start + n <= 128
        assert text[start - n - 1:start] == text[start:start + n + 1]
        assert text[start - 1] == "\n" and text[start:start + n].isalpha()
        assert start == n + 1 or text[start - n - 2] == "\n"
        begins.add((n, start - n - 1))
    assert {(48, 0), (48, 31)} <= begins   # at both ends of the context


class Knowing:
    """Instead of a model: it knows the next token, except where wrong(idx, next) is true"""

    def __init__(self, chars):
        self.tokenizer_spec = {"kind": "char", "chars": chars}
        self.wrong = None

    def __call__(self, idx, targets):
        guess = targets.clone()
        if self.wrong:
            guess[self.wrong(idx, targets)] += 1
        return torch.nn.functional.one_hot(guess, 28), None


def test_recall_counts_the_second_line_from_its_second_letter_on(monkeypatch):
    chars = "".join(sorted(set(small_models.recall_text()[:20_000])))
    line_break = chars.index("\n")
    model = Knowing(chars)
    monkeypatch.setattr(GPT, "from_pretrained", lambda path: model)

    def shares():
        return [row[3] for row in small_models.share_recalled(None, Path("out"), [])]
    assert shares() == [1.0, 1.0, 1.0]
    for outside in (lambda idx, y: idx == line_break, lambda idx, y: y == line_break):
        model.wrong = outside   # first letters; ends of lines
        assert shares() == [1.0, 1.0, 1.0]
    for inside in (lambda idx, y: idx.roll(1, dims=1) == line_break,   # second letters
                   lambda idx, y: y.roll(-1, dims=1) == line_break):   # last letters
        model.wrong = inside
        assert shares() == pytest.approx([1 - 1 / (n - 1) for n in (12, 24, 48)], abs=1e-3)


@pytest.fixture
def made(monkeypatch):
    """-> the jobs, which are listed instead of run, and the function, which may be failing"""
    jobs = []

    def run(f, job, flags):
        if run.failing and job.seed == 2:
            raise InputError("the loss is not finite")
        jobs.append(job)
        return [(*job, "flags", 0, 128, claims.recorded(flags)),
                (*job, "text", 0, 128, claims.hash_of_text(job.data)),
                (*job, "loss", 300, 128, "1.5000")]
    run.failing = False
    for module in (claims, measure):
        monkeypatch.setattr(module, "RESULTS", Path("results"))
    monkeypatch.setattr(claims, "in_new_process", run)
    monkeypatch.setattr(claims, "prepare_texts", lambda names: None)
    monkeypatch.setattr(claims, "hash_of_text", lambda data: f"hash of {data}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")   # so that it is as before afterwards
    return jobs, run


def run_claims(*argv):
    assessment.__main__.main(["claims", *argv])


def test_finished_runs_are_kept_and_not_made_again(made, capsys):
    jobs, _ = made
    run_claims("stretch")
    assert len(jobs) == 3
    run_claims("stretch", "recall")
    assert len(jobs) == 3 + 24
    run_claims("stretch", "recall")   # names with commas came back
    assert len(jobs) == 3 + 24
    rows = measure.read_results("claims.csv")
    assert tables.values_of(rows, "stretch", "rope") == {1: 1.5, 2: 1.5, 3: 1.5}
    assert "24 runs to do" in capsys.readouterr().out
    run_claims("stretch", "--again")
    assert len(jobs) == 3 + 24 + 3


def test_run_missing_or_changed_than_now_is_made_again(made, monkeypatch):
    jobs, _ = made
    run_claims("stretch")
    part = claims.PARTS["stretch"]
    monkeypatch.setitem(claims.PARTS, "stretch", part._replace(flags=("--weight_decay=0.2",)))
    run_claims("stretch")
    assert len(jobs) == 3 + 3
    assert len(measure.read_results("claims.csv")) == 3 * 3
    monkeypatch.setattr(claims, "hash_of_text", lambda data: "another text")
    run_claims("stretch")
    assert len(jobs) == 3 + 3 + 3
    run_claims("stretch")
    assert len(jobs) == 3 + 3 + 3


def test_rows_are_in_the_order_of_the_parts_and_those_of_no_part_come_last(made):
    gone = claims.Job("gone", "shakespeare", "rope", 1)
    claims.write_rows({gone: [(*gone, "loss", 300, 128, "1.5000")]})
    run_claims("recall")
    run_claims("stretch")
    parts = [row["part"] for row in measure.read_results("claims.csv")]
    assert list(dict.fromkeys(parts)) == ["stretch", "recall", "gone"]


def test_changed_text_has_another_hash():
    hashes = []
    for text in ("a text", "a text\n"):
        Path("text.txt").write_text(50 * text)
        prepare_text(Path("data/mine"), [Path("text.txt")], "char")
        hashes.append(claims.hash_of_text("mine"))
    assert len(set(hashes)) == 2 and all(re.fullmatch("[0-9a-f]{8}", found) for found in hashes)


def test_texts_are_prepared_where_they_are_missing_and_that_of_recall_always(monkeypatch):
    prepared = []
    monkeypatch.setattr(claims, "prepare", prepared.append)
    monkeypatch.setattr(claims, "prepare_text", lambda folder, *rest: prepared.append(folder.name))
    for name in ("recall", "shakespeare"):
        Path("data", name).mkdir()
        Path("data", name, "meta.json").write_text("{}")
    claims.prepare_texts(["recall", "shakespeare", "stdlib"])
    assert prepared == ["recall", "stdlib"]


def test_run_that_is_missing_or_has_other_flags_than_now_is_in_no_table(made, monkeypatch):
    monkeypatch.setattr(claims, "PARTS", {"stretch": claims.PARTS["stretch"]})
    run_claims("stretch")
    assert claims.missing_or_changed(claims.finished()) == []
    part = claims.PARTS["stretch"]
    monkeypatch.setitem(claims.PARTS, "stretch", part._replace(flags=("--weight_decay=0.2",)))
    assert len(claims.missing_or_changed(claims.finished())) == 3
    with pytest.raises(InputError, match="stretch .* other flags than now: run .* claims stretch"):
        tables.rows_of_claims.__wrapped__()   # without its cache
    monkeypatch.setitem(claims.PARTS, "stretch", part._replace(seeds=4))
    assert [job.seed for job in claims.missing_or_changed(claims.finished())] == [4]


def test_results_of_one_dtype_only(made, monkeypatch):
    jobs, _ = made
    monkeypatch.setattr(claims, "machine", lambda: (None, True, "bfloat16 is faster here"))
    run_claims("stretch")
    monkeypatch.setattr(claims, "machine", lambda: (None, False, "float32"))
    run_claims("windows")
    path = Path("results/claims.csv")
    assert path.read_text().count("--dtype=bfloat16") == 3 + 9
    path.write_text(path.read_text().replace("--dtype=bfloat16", "--dtype=float32", 1))
    fails(assessment.__main__, "claims", "windows", match="which do not compare")


def test_run_that_fails_stops_no_other_and_is_made_again(made, capsys):
    jobs, run = made
    run.failing = True
    fails(assessment.__main__, "claims", "stretch", match="1 of 3 runs failed")
    assert {row["seed"] for row in measure.read_results("claims.csv")} == {"1", "3"}
    with pytest.raises(InputError, match="2 of 3 seeds; run .* claims --again stretch"):
        tables.values_of(measure.read_results("claims.csv"), "stretch", "rope")
    run.failing = False
    run_claims("stretch")
    assert "1 runs to do" in capsys.readouterr().out
    assert len(jobs) == 3


def test_run_that_fails_when_made_again_leaves_the_earlier_result(made):
    jobs, run = made
    run_claims("stretch")
    before = Path("results/claims.csv").read_text()
    run.failing = True
    fails(assessment.__main__, "claims", "stretch", "--again", match="1 of 3 .* is as it was")
    assert len(jobs) == 3 + 2
    assert Path("results/claims.csv").read_text() == before


def test_rows_of_a_job_are_its_flags_its_text_its_losses_and_what_is_looked_up(monkeypatch):
    monkeypatch.setattr(claims, "hash_of_text", lambda data: f"hash of {data}")
    monkeypatch.setattr(claims, "train_quietly", lambda out, flags: {0: 4.0, 300: 1.5})
    part = claims.PARTS["stretch"]._replace(look=lambda *job_out_flags: [("plain", 300, 256, 2.0)])
    monkeypatch.setitem(claims.PARTS, "stretch", part)
    job = claims.Job("stretch", "tiny", "rope", 1)
    rows = claims.rows_of_job(job, ["--block_size=64"])
    assert {row[:4] for row in rows} == {job}
    assert [row[4:] for row in rows] == [
        ("flags", 0, 64, claims.recorded(["--block_size=64"])),
        ("text", 0, 64, "hash of tiny"),
        ("loss", 0, 64, "4.0000"),
        ("loss", 300, 64, "1.5000"),
        ("plain", 300, 256, "2.0000"),
    ]


@needs_linux
def test_two_claims_at_once_do_not_overwrite_each_other(made):
    with locked(Path("results")):
        fails(assessment.__main__, "claims", "stretch", match="is writing to results: wait")
    run_claims("stretch")


def test_seeds_that_do_not_match_are_not_compared():
    with pytest.raises(InputError, match="cannot be paired"):
        tables.difference({1: 1.0, 2: 2.1}, {1: 0.5, 3: 1.5})


@pytest.mark.parametrize("n", [1, 10])
def test_interval_of_a_number_of_values_without_its_t_is_refused(n):
    with pytest.raises(InputError, match=f"2 to 9 or 25 values, found {n}"):
        measure.interval([1.0] * n)


def test_values_at_several_lengths_are_not_mixed():
    rows = [{"part": "stretch", "variant": "rope", "measure": "plain", "step": "300", "seed": seed,
             "length": length, "value": "2.0"} for seed in "123" for length in ("128", "256")]
    with pytest.raises(InputError, match="at 2 lengths"):
        tables.values_of(rows, "stretch", "rope", "plain")
    found = tables.values_of(rows, "stretch", "rope", "plain", length=256)
    assert found == {1: 2.0, 2: 2.0, 3: 2.0}


def test_run_that_was_stopped_is_not_taken_for_a_finished_one(monkeypatch):
    def stopped(flags):
        Path("out").mkdir()
        Path("out/metrics.csv").write_text("step,val_loss\n0,4.0\n200,2.0\n")
    monkeypatch.setattr(train, "main", stopped)
    with pytest.raises(InputError, match="stopped before its last step"):
        small_models.train_quietly(Path("out"), [])


def test_unknown_part_is_one_clear_line():
    fails(assessment.__main__, "claims", "nothing", match="claims nothing: unknown part")
