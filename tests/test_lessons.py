"""The lessons: links to lines, excerpts, names of tests and numbers are those of the code."""

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import HERE, TINY, fails, rows

import lessons.attention
import lessons.exercises as exercises
import lessons.pictures
import train
from lessons.links import LINK, renewed
from model import GPT, GPTConfig, attend, keys_per_query, visible
from train import load_config

LESSONS = HERE / "lessons"
PAGES = sorted(LESSONS.glob("*.md"))
NUMBERED = [page for page in PAGES if page.name[0].isdigit()]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def read(path):
    return path.read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------
# What a page says of the code

@every_page
def test_links_lead_to_the_lines_of_what_they_name(page):
    assert renewed(read(page)) == read(page), "python -m lessons.links renews them"
    assert read(page).count(".py#L") == len(LINK.findall(read(page)))


@every_page
def test_excerpts_are_in_the_code(page):
    marked = read(page).count("```python")
    assert read(page).count(" -->\n```python") == marked - read(page).count("\n\n```python")
    for file, name, excerpt in re.findall(
            r"<!-- ([\w/.]+\.py): ([\w.]+) -->\n```python\n(.*?)```", read(page), re.DOTALL):
        source = read(HERE / file)
        lines = [line.strip() for line in exercises.source_of(source, name).splitlines()]
        wanted = [line.strip() for line in excerpt.splitlines()]
        places = range(len(lines) - len(wanted) + 1)
        assert any(lines[i:i + len(wanted)] == wanted for i in places), (file, name)


@every_page
def test_every_test_that_is_named_exists(page):
    found = set()
    for path in (HERE / "test_model.py", *(HERE / "tests").glob("test_*.py")):
        found |= set(re.findall(r"^def (test_\w+)", read(path), re.MULTILINE))
    named = re.findall(r"`(test_\w+)`", read(page))
    assert set(named) <= found, set(named) - found


def test_every_lesson_is_one_screen_in_the_one_form():
    assert len(NUMBERED) == 8
    for page in NUMBERED:
        text = read(page)
        assert len(text.splitlines()) <= 80, page.name
        parts = ("Problem", "Cost", "Pitfalls", "Paper", "Run it", "Tests", "Exercise")
        assert [part for part in parts if f"**{part}" not in text] == [], page.name


def test_four_lines_of_attention_equal_attend():
    lines = re.search(r"<!-- tested: four lines -->\n```python\n(.*?)```",
                      read(LESSONS / "2_attention.md"), re.DOTALL)[1]
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 7, 8)
    names = {"q": q, "k": k, "v": v, "D": 8, "pos": torch.arange(7), "math": math, "torch": torch,
             "visible": visible}
    exec(lines, names)
    assert len(lines.splitlines()) == 4
    assert torch.allclose(names["y"], attend(q, k, v, causal=True), atol=1e-6)


def test_numbers_in_the_lessons_are_computed():
    with torch.device("meta"):
        gpt2 = GPT(GPTConfig())
        grouped = GPT(GPTConfig(use_gqa=True, n_kv_head=4))
        xl = GPT(load_config([str(HERE / "config/gpt2_xl.py")])[1])
    block = sum(p.numel() for p in gpt2.h[0].parameters() if p.dim() == 2)
    per_token = 2 * 12 * 12 * 64 * 4
    assert block == 12 * 768**2
    attention_of = {T: gpt2.flops_per_token(T) - gpt2.flops_per_token(0) for T in (1536, 4608)}
    assert attention_of[1536] == 6 * 12 * 4 * 768**2    # the projections
    assert attention_of[4608] == 6 * 12 * 12 * 768**2   # all of a block
    turns = [2 * math.pi * 10_000 ** (2 * d / 16) for d in range(8)]
    assert sum(turn <= 128 for turn in turns) == 3
    said = {
        "1_gpt2.md": [f"{gpt2.num_params():,} parameters",
                      f"{gpt2.flops_per_token(1024) / 1e9:.2f} billion"],
        "2_attention.md": ["T = 2C", "T = 6C: 4,608 tokens"],
        "3_rope.md": [f"{1024 * 768:,}", f"turns once in {turns[0]:.0f} tokens",
                      f"pair 4 needs {turns[4]:.0f}"],
        "4_gqa.md": [f"{per_token:,} bytes", f"{per_token // 3:,} with 4 key/value heads",
                     f"{grouped.num_params() / 1e6:.1f}M parameters instead of "
                     f"{gpt2.num_params() / 1e6:.1f}M"],
        "6_cache.md": [f"{per_token * 1024 / 1e6:.1f} MB for",
                       f"{per_token * 1024 / 3e6:.1f} MB with",
                       f"{per_token * 256 / 1e6:.1f} MB for as many"],
        "7_processes.md": [f"{xl.num_params():,} parameters",
                           f"{16 * xl.num_params() / 1e9:.1f} GB"],
        "8_resuming.md": [f"{12 * gpt2.num_params() / 1e9:.1f} GB",
                          f"{math.sqrt(1 - 0.95) / (1 - 0.9):.1f} times too large",
                          f"second {math.sqrt(1 - 0.95**2) / (1 - 0.9**2):.1f} times"],
    }
    for page, numbers in said.items():
        for number in numbers:
            assert number in " ".join(read(LESSONS / page).split()), (page, number)


# config/class.py with these flags, and the validation losses that lessons state, by step. That of
# lesson 4 goes on from the weights of lesson 1.
CLASS = {
    "1_gpt2.md": ([], {0: "4.1893", 50: "2.5711", 100: "2.4486", 150: "2.3070", 200: "2.2332"}),
    "3_rope.md": (["config/rope.py"], {200: "2.0357"}),
    "4_gqa.md": (["--init_from=out", "--use_gqa", "--n_kv_head=1"],
                 {0: "2.5996", 50: "2.2971", 100: "2.1519"}),
    "5_windows.md": (["--use_swa", "--window_size=8"], {200: "2.0635"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("page", CLASS)
def test_the_class_sees_these_losses(page):
    text = HERE / "data/shakespeare/input.txt"
    if not text.exists():
        pytest.skip("tiny Shakespeare is not on this machine: put it at data/shakespeare/input.txt")
    Path("data/shakespeare").mkdir()
    shutil.copy(text, "data/shakespeare/input.txt")
    config = str(HERE / "config/class.py")
    flags, losses = CLASS[page]
    assert all(loss in read(LESSONS / page) for loss in losses.values())
    if "--init_from=out" in flags:
        train.main([config, "--out_dir=out"])
    flags = [str(HERE / flag) if flag.startswith("config/") else flag for flag in flags]
    train.main([config, *flags, "--out_dir=new"])
    found = {int(row["step"]): row["val_loss"] for row in rows("new/metrics.csv")}
    for step, loss in losses.items():
        assert float(found[step]) == pytest.approx(float(loss), abs=2e-4)


# ------------------------------------------------------------------------------------------------
# Pictures

def test_attention_weights_are_those_the_model_uses():
    torch.manual_seed(0)
    switches = {"use_rope": True, "use_gqa": True, "n_kv_head": 2, "use_swa": True,
                "window_size": (3, 0)}
    model = GPT(GPTConfig(16, 17, 2, 4, 32, **switches)).eval()
    idx = torch.randint(17, (1, 12))
    outputs = {}
    for i, block in enumerate(model.h):
        block.attn.register_forward_hook(
            lambda module, args, out, i=i: outputs.update({i: (args[0], out)}))
    found = lessons.attention.attention_weights(model, idx)
    for i, block in enumerate(model.h):
        x, expected = outputs[i]
        v = block.attn.c_attn(x).view(1, 12, 8, 8).transpose(1, 2)[:, 6:].repeat_interleave(2, 1)
        y = (found[i] @ v).transpose(1, 2).reshape(1, 12, 32)
        assert torch.allclose(block.attn.c_proj(y), expected, atol=1e-6)


@pytest.mark.parametrize("T, W", [(16, 4), (18, 4), (7, 3)])
def test_blocks_are_drawn_as_they_are_computed(T, W):
    drawn = lessons.pictures.seen_in_blocks(T, W)
    pos = torch.arange(T)
    assert torch.equal(drawn == 3, visible(pos, pos, W))
    assert (drawn > 0).sum() == pytest.approx(T * keys_per_query(T, W))


@pytest.mark.usefixtures("short_sample")
def test_maps_of_ones_own_run_are_drawn():
    train.main([*TINY, "--max_iters=6"])
    lessons.attention.main(["--out_dir=out", "--prompt=the", "--tokens=6", "--heads=0"])
    assert Path("out/attention.png").stat().st_size > 1000
    assert len(rows("out/attention.csv")) == 2 * 2 * 21   # two layers, without and with a window


@pytest.mark.parametrize("argument, match", [
    ("--heads=9", "--heads=9: expected numbers below 2"),
    ("--layers=x", "--layers=x: expected numbers below"),
    ("--what=1", "--what=1: expected --NAME=VALUE with one of out_dir"),
    ("--tokens=99999", "--tokens=99999: expected one number from 1 to 8"),
    ("--tokens=0", "--tokens=0: expected one number from 1 to 8"),
    ("--tokens=3,4", "--tokens=3,4: expected one number"),
    ("--window_size=0", "--window_size=0: expected one number from 1"),
    ("--heads=²", "--heads=²: expected numbers below 2"),
    ("--out_dir=nothing", "nothing: not one of"),
    ("--prompt=", "empty prompt"),
])
@pytest.mark.usefixtures("short_sample")
def test_maps_that_cannot_be_drawn_are_one_clear_line(argument, match):
    if "nothing" not in argument:
        train.main([*TINY, "--max_iters=6"])
    fails(lessons.attention, "--out_dir=out", "--heads=0", argument, match=match)


@pytest.mark.slow
def test_pictures_are_those_that_are_committed(tmp_path):
    copy = project(tmp_path)
    drawn = sorted(path.name for path in (copy / "lessons").glob("*.png"))
    assert len(drawn) == 5
    for name in drawn:
        (copy / "lessons" / name).unlink()
    subprocess.run([sys.executable, "-m", "lessons.pictures"], cwd=copy, check=True)
    for name in drawn:
        assert (copy / "lessons" / name).read_bytes() == (LESSONS / name).read_bytes(), name


# ------------------------------------------------------------------------------------------------
# Exercises

ANYONE = ["-c", "user.name=a", "-c", "user.email=a@b"]


def project(folder):
    """A copy of the project with a git repository of its own"""
    copy = folder / "project"
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=HERE, check=True,
                           capture_output=True, encoding="utf-8").stdout.splitlines()
    for file in files:
        if (HERE / file).exists():
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(HERE / file, copy / file)
    for arguments in (["init", "-q"], ["add", "."],
                      [*ANYONE, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *arguments], cwd=copy, check=True)
    return copy


def run(copy, *arguments):
    done = subprocess.run([sys.executable, "lessons/exercises.py", *arguments], cwd=copy,
                          capture_output=True, encoding="utf-8")
    return done.returncode, done.stdout, done.stderr


def test_every_function_and_test_of_the_exercises_exists():
    for name, (functions, graders) in exercises.EXERCISES.items():
        for function in functions:
            file, qualified_name = function.split(":")
            assert exercises.find(read(HERE / file), qualified_name) is not None, function
        assert len(exercises.located(graders)) == len(graders) > 1
        assert f"\n## {name}\n" in read(LESSONS / "exercises.md")
        pages = [page for page in NUMBERED if f"(exercises.md#{name})" in read(page)]
        assert len(pages) == 1, name


def test_an_exercise_can_be_started_shown_and_restored(tmp_path):
    copy = project(tmp_path)
    before = read(copy / "model.py")
    status, out, _ = run(copy)
    assert status == 0 and re.search(r"rope +model.py:rotate", out)
    status, out, _ = run(copy, "start", "rope")
    assert status == 0 and "git restore model.py" in out
    emptied = read(copy / "model.py")
    assert '"""\n    raise NotImplementedError\n\n\ndef visible' in emptied
    assert re.search(r"rope +started", run(copy)[1])
    status, _, err = run(copy, "start", "rope")
    assert status == 1 and err.startswith("error: rope is started: write it")
    status, _, err = run(copy, "start", "mlp")
    assert status == 1 and err.startswith("error: model.py has changes that are not committed")
    assert read(copy / "model.py") == emptied
    (copy / "model.py").write_text(emptied.replace("raise NotImplementedError", "return x"))
    assert re.search(r"rope +written: check it", run(copy)[1])
    (copy / "model.py").write_text(emptied.replace("raise NotImplementedError", "return ("))
    status, _, err = run(copy)
    assert status == 1 and re.match(r"error: model.py, line \d+: ", err) and err.count("\n") == 1
    subprocess.run(["git", "restore", "model.py"], cwd=copy, check=True)
    assert read(copy / "model.py") == before

    task = run(copy, "show", "rope")[1]
    assert "Write `rotate`" in task and "Hint" not in task and "show rope 1" in task
    assert "Hint 1 of 2" in run(copy, "show", "rope", "1")[1]
    assert "Hint 2 of 2" in run(copy, "show", "rope", "2")[1]


def test_the_project_may_be_in_a_folder_of_a_larger_repository(tmp_path):
    copy = project(tmp_path)
    (copy / ".git").rename(tmp_path / ".git")
    for arguments in (["add", "."], [*ANYONE, "commit", "-q", "-m", "moved"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    assert run(copy, "start", "rope")[0] == 0
    assert re.search(r"rope +started", run(copy)[1])
    source = read(copy / "model.py").replace("raise NotImplementedError", "return x")
    (copy / "model.py").write_text(source, encoding="utf-8")
    assert re.search(r"rope +written: check it", run(copy)[1])


def test_comments_on_what_is_emptied_go_too():
    source = "def f(x):\n    # a comment\n    # of two lines\n    return x   # and one more\n"
    assert exercises.empty(source, "f") == "def f(x):\n    raise NotImplementedError\n"


@pytest.mark.parametrize("arguments, match", [
    (["begin", "rope"], "error: begin: unknown; choose from show, start, check"),
    (["start", "ropes"], "error: start ropes: choose from mlp, "),
    (["check"], "error: check what.: choose from"),
    (["show", "rope", "x"], "error: show rope x: expected a name; after show"),
    (["start", "rope", "1"], "error: start rope 1: expected a name"),
])
def test_wrong_use_of_the_exercises_is_one_clear_line(arguments, match):
    status, _, err = run(HERE, *arguments)
    assert status == 1 and re.match(match, err) and err.count("\n") == 1


def test_outside_a_git_repository_nothing_is_emptied(tmp_path):
    copy = project(tmp_path)
    shutil.rmtree(copy / ".git")
    before = read(copy / "model.py")
    status, _, err = run(copy, "start", "rope")
    assert status == 1 and "not a git repository" in err and err.count("\n") == 1
    assert read(copy / "model.py") == before
    assert run(copy)[0] == 0   # the list needs no git


def passes(copy, name):
    """Whether the graders of an exercise pass"""
    status, out, _ = run(copy, "check", name)
    assert status in (0, 1) and re.search(r"passed|failed|error", out), out   # they were run
    return status == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", exercises.EXERCISES)
def test_an_emptied_function_fails_its_tests_and_the_restored_one_passes(name, tmp_path):
    copy = project(tmp_path)
    assert run(copy, "start", name)[0] == 0
    assert not passes(copy, name)
    subprocess.run(["git", "restore", "."], cwd=copy, check=True)
    assert passes(copy, name)
    assert not (copy / "lessons/answers").exists()   # nobody wrote it


# What a student may write instead, and the test that notices: exercise, old, new, test
WRONG = [
    ("attend", "dropout_p=dropout, is_causal=True)", "dropout_p=dropout)",
     "test_future_never_leaks_into_the_past"),
    ("attend", "q = q.reshape(B, K,", "q = q.unflatten(1, (G, K)).transpose(1, 2).reshape(B, K,",
     "test_attend_without_a_mask_sees_every_key_of_a_cache"),
    ("mlp", 'approximate="tanh"', 'approximate="none"',
     "test_loss_and_gradients_equal_transformers"),
    ("mlp", "F.dropout(self.c_proj(x), self.dropout, self.training)",
     "F.dropout(self.c_proj(x), self.dropout)", "test_dropout_acts_in_training_only"),
    ("init", "math.sqrt(2 * config.n_layer)", "math.sqrt(config.n_layer)",
     "test_initialisation_scales_residual_projections_by_depth"),
    ("init", "if config.tied:", "if False:",
     "test_embedding_and_head_are_one_tensor_unless_untied"),
    ("flops", "keys_per_query(T, W) for", "T for", "test_flops_per_token_is_what_torch_counts"),
    ("flops", "6 * (weights + 2 *", "6 * (weights + ", "test_flops_per_token_is_what_torch_counts"),
    ("names", 'if module.endswith(table["no_bias"]) else', 'if False else',
     "test_logits_and_text_are_those_of_transformers_and_the_way_back_is_exact"),
    ("sample", "p.cumsum(-1) - p >= top_p", "p.cumsum(-1) >= top_p",
     "test_sampling_follows_the_distribution_of_transformers"),
    ("sample", "top_p is not None and top_p < 1", "top_p is not None",
     "test_top_p_of_1_excludes_nothing"),
    ("rope", "pos[:, None].float()", "pos[:, None].type_as(x)",
     "test_bfloat16_is_rotated_in_float32"),
    ("rope", "a * cos - b * sin, b * cos + a * sin", "a * cos + b * sin, b * cos - a * sin",
     "test_rotation_is_a_product_of_complex_numbers"),
    ("gqa", "x.repeat_interleave(G, dim=1)", "x.repeat(1, G, 1, 1)",
     "test_gqa_equals_multi_head_with_repeated_heads"),
    ("gqa", "heads.mean(dim=1)", "heads.sum(dim=1)",
     "test_mean_of_identical_heads_changes_nothing"),
    ("visible", "distance < window", "distance <= window", "test_visible_is_the_definition"),
    ("blocks", "    qs, ks, vs = (x.split",
     "    seen = visible(torch.arange(q.shape[2]), torch.arange(q.shape[2]), window)\n"
     "    return attend(q, k, v, seen, dropout=dropout)\n    qs, ks, vs = (x.split",
     "test_flops_per_token_is_what_torch_counts"),
    ("blocks", "mask[:n, end - S:end], dropout=dropout", "mask[:n, end - S:end]",
     "test_blocks_under_dropout_have_the_mean_of_those_without"),
    ("ring", ".detach().type_as(self.k)", ".type_as(self.k)",
     "test_cache_keeps_no_history_of_gradients"),
    ("ring", "min(self.length, len(self.pos))", "len(self.pos)",
     "test_cached_equals_uncached_in_chunks_past_several_wraps"),
    ("accumulate", " * (place.micro / share)", "",
     "test_accumulation_changes_nothing_but_rounding"),
    ("accumulate", "sync=is_last", "sync=True",
     "test_gradients_are_sent_once_per_step_however_many_parts_it_has"),
    ("schedule", "(step + 1) / (c.warmup_iters + 1)", "step / (c.warmup_iters + 1)",
     "test_learning_rate_warms_up_and_follows_a_cosine"),
    ("schedule", '"weight_decay": 0.0', '"weight_decay": c.weight_decay',
     "test_first_step_equals_one_written_out_by_hand"),
    ("order", "[self.seed, epoch]", "[self.seed]",
     "test_epochs_differ_in_order_and_in_where_windows_begin"),
    ("order", "if epoch != self.epoch:", "if self.epoch is None:",
     "test_epochs_differ_in_order_and_in_where_windows_begin"),
    ("ddp", "    net = DistributedDataParallel(model, gradient_as_bucket_view=True)\n",
     "    return model\n",
     "test_every_mode_gives_the_losses_and_gradient_norms_of_one_process"),
    ("fsdp", "    fully_shard(model, mesh=mesh, mp_policy=policy)\n", "    return model\n",
     "test_every_mode_gives_the_losses_and_gradient_norms_of_one_process"),
    ("resume", 'load_state_dict({"state": state,', 'load_state_dict({"state": {},',
     "test_resumed_run_is_exact_to_the_bit"),
]


def test_every_wrong_answer_is_in_its_exercise_and_its_test_among_the_graders():
    assert {name for name, *_ in WRONG} == set(exercises.EXERCISES)
    for name, old, _, test in WRONG:
        functions, graders = exercises.EXERCISES[name]
        bodies = []
        for function in functions:
            file, qualified_name = function.split(":")
            source = read(HERE / file)
            bodies.append(exercises.source_of(source, qualified_name))
        assert sum(body.count(old) for body in bodies) == 1, (name, old)
        assert test in graders, (name, test)


@pytest.mark.slow
@pytest.mark.parametrize("name, old, new, test", WRONG)
def test_wrong_answer_is_noticed(name, old, new, test, tmp_path):
    copy = project(tmp_path)
    for file in exercises.files_of(name):
        source = read(copy / file)
        functions = [f.split(":")[1] for f in exercises.EXERCISES[name][0] if f.startswith(file)]
        for qualified_name in functions:
            body = exercises.source_of(source, qualified_name)
            source = source.replace(body, body.replace(old, new))
        (copy / file).write_text(source, encoding="utf-8")
    assert not passes(copy, name)
    command = [sys.executable, "-m", "pytest", "-q", *exercises.located([test])]
    done = subprocess.run(command, cwd=copy, capture_output=True, encoding="utf-8")
    assert done.returncode == 1, done.stdout


# Another right answer to "ddp": as the exercise says, of about sixteen lines
OWN_DDP = '''
    class Replicas(torch.nn.Module):
        require_backward_grad_sync = True

        def __init__(self, model):
            super().__init__()
            self.module = model
            for p in model.parameters():
                p.register_post_accumulate_grad_hook(self.average)

        def average(self, p):
            if self.require_backward_grad_sync:
                p.grad /= dist.get_world_size()
                dist.all_reduce(p.grad)

        def forward(self, *args, **options):
            return self.module(*args, **options)

    return Replicas(model)
'''


@pytest.mark.slow
def test_a_DistributedDataParallel_of_ones_own_passes(tmp_path):
    copy = project(tmp_path)
    assert run(copy, "start", "ddp")[0] == 0
    source = read(copy / "train.py").replace("\n    raise NotImplementedError\n", OWN_DDP)
    (copy / "train.py").write_text(source, encoding="utf-8")
    assert re.search(r"ddp +written: check it", run(copy)[1])
    assert passes(copy, "ddp") and passes(copy, "accumulate")
    for _ in range(2):   # with the answer in place, and with what was there
        assert re.search(r"ddp +solved", run(copy)[1])
        subprocess.run(["git", "restore", "."], cwd=copy, check=True)
    assert "class Replicas" in read(copy / "lessons/answers/ddp.py")


@pytest.mark.skipif(sys.platform == "win32", reason="a broken pipe is another error there")
def test_list_of_exercises_may_be_cut_off_by_its_reader():
    process = subprocess.Popen([sys.executable, "lessons/exercises.py"], cwd=HERE,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0
    process.stderr.close()
