"""What a GPU will do, as far as it can be shown without one."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from functorch.compile import aot_module, make_boxed_compiler
from helpers import HERE, LONGER, TINY, checkpoint, same_course, same_state, start_machines
from test_tokenizers import trained
from torch.nn.attention import varlen

import model as model_module
import sample
import train
from model import GPT, GPTConfig, attend_in_blocks, attend_with_flash, flash_fits, visible
from plumbing import processes
from plumbing.device import padded
from plumbing.files import give_second_name
from plumbing.processes import AnyRank, Group, wait_until
from plumbing.tokenizer import Tokenizer
from prepare_data import prepare_text

pytestmark = pytest.mark.usefixtures("short_sample")


# ------------------------------------------------------------------------------------------------
# Attention

def masked_attention(q, k, v, begins_q, begins_k, longest_q, longest_k, window_size):
    """What varlen_attn is said to compute, for sequences of equal length"""
    left, right = window_size
    assert right == 0 and torch.equal(begins_q, begins_k)
    T = longest_q
    pos = torch.arange(T)
    mask = visible(pos, pos, left + 1)
    q, k, v = (x.unflatten(0, (-1, T)).transpose(1, 2) for x in (q, k, v))
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
    return y.transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize("T, W", [(32, 8), (29, 5), (8, 7), (9, 1)])
@pytest.mark.parametrize("K", [1, 2, 4])
def test_windows_by_flash_attention_equal_those_in_blocks(monkeypatch, T, W, K):
    monkeypatch.setattr(varlen, "varlen_attn", masked_attention)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 4, T, 16), torch.randn(3, K, T, 16), torch.randn(3, K, T, 16)
    flash = attend_with_flash(q, k, v, W)
    assert torch.allclose(flash, attend_in_blocks(q, k, v, W), atol=1e-5)


def on_meta(*shape):
    return torch.empty(shape, device="meta", dtype=torch.bfloat16, requires_grad=True)


def test_torch_has_this_flash_attention_forward_and_backward_and_compiles_it_whole():
    q, k, v = (on_meta(2, 4, 64, 32) for _ in range(3))
    y = attend_with_flash(q, k, v, 16)
    assert y.shape == q.shape and y.dtype == torch.bfloat16
    y.backward(torch.empty_like(y))
    assert q.grad.shape == q.shape and k.grad.shape == k.shape
    compiled = torch.compile(attend_with_flash, backend="aot_eager", fullgraph=True)
    assert compiled(q, k, v, 16).shape == q.shape


class OnGPU:
    """A tensor as flash_fits sees it"""
    is_cuda = True

    def __init__(self, D, dtype, generation):
        self.shape, self.dtype, self.device = (2, 4, 64, D), dtype, generation


@pytest.mark.parametrize("D, dtype, dropout, generation, fits", [
    (64, torch.bfloat16, 0.0, 8, True), (192, torch.bfloat16, 0.0, 9, True),
    (200, torch.bfloat16, 0.0, 9, False), (60, torch.bfloat16, 0.0, 9, False),
    (64, torch.bfloat16, 0.0, 7, False), (64, torch.float32, 0.0, 9, False),
    (64, torch.bfloat16, 0.1, 9, False),
])
def test_flash_attention_is_used_only_where_it_can_be(
        D, dtype, dropout, generation, fits, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda generation: SimpleNamespace(major=generation))
    built_with = "is_flash_attention_available"
    monkeypatch.setattr(torch.backends.cuda, built_with, lambda: True)
    assert flash_fits(OnGPU(D, dtype, generation), dropout) == fits
    assert not flash_fits(torch.zeros(1, 1, 2, D, dtype=dtype), dropout)   # a CPU
    monkeypatch.setattr(torch.backends.cuda, built_with, lambda: False)
    assert not flash_fits(OnGPU(D, dtype, generation), dropout)


@pytest.mark.parametrize("fits", [True, False])
def test_a_model_with_windows_asks_whether_flash_attention_fits(fits, monkeypatch):
    called = []

    def flash(q, k, v, window):
        called.append(window)
        return attend_in_blocks(q, k, v, window)
    torch.manual_seed(0)
    model = GPT(GPTConfig(16, 17, 2, 2, 16, use_swa=True, window_size=(4, 0)))
    idx = torch.randint(17, (2, 16))
    expected = model(idx)[0]
    monkeypatch.setattr(model_module, "flash_fits", lambda q, dropout: fits)
    monkeypatch.setattr(model_module, "attend_with_flash", flash)
    assert torch.equal(model(idx)[0], expected)
    assert called == ([4] if fits else [])


@pytest.fixture
def cudnn():
    """The switch for cuDNN's attention, on at first"""
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield torch.backends.cuda.cudnn_sdp_enabled
    torch.backends.cuda.enable_cudnn_sdp(True)


def test_cuDNNs_attention_is_off_with_windows_and_while_sampling(cudnn, monkeypatch):
    during = []
    step = train.train_step

    def note(*args):
        during.append(cudnn())
        return step(*args)
    monkeypatch.setattr(train, "train_step", note)
    train.main([*TINY, "--max_iters=1"])
    assert during == [True] and not cudnn()   # there was a sample at the end
    torch.backends.cuda.enable_cudnn_sdp(True)
    train.main([*TINY, "--max_iters=1", "--use_swa", "--window_size=3"])
    assert during == [True, False]
    torch.backends.cuda.enable_cudnn_sdp(True)
    sample.main(["--max_new_tokens=1", "--device=cpu"])
    assert not cudnn()


# ------------------------------------------------------------------------------------------------
# The vocabulary and the loss

@pytest.mark.parametrize("n, expected", [
    (17, 17), (1023, 1023), (1024, 1024), (1025, 1088), (50257, 50304), (50304, 50304),
])
def test_new_models_have_a_vocabulary_that_GPUs_multiply_fast(n, expected):
    assert padded(n) == expected


def test_padded_vocabulary_trains_and_shows_in_neither_samples_nor_exports(capsys):
    foreign = trained()
    foreign.add_special_tokens([f"<{i}>" for i in range(1100 - 400)])
    GPT(GPTConfig(8, 1100, 1, 2, 16)).save_pretrained("weights")
    foreign.save("weights/tokenizer.json")
    prepare_text(Path("data/tiny"), ["text.txt"], "weights")
    train.main(TINY)
    assert checkpoint()["gpt_config"]["vocab_size"] == 1152
    train.main([*TINY, "--max_iters=14", "--init_from=resume"])

    ours = GPT.from_pretrained("out")
    with torch.no_grad():
        ours.wte.weight[1100:] = 100 * ours.wte.weight[:1].sign()   # what is padded would win
    seen = ours.generate(torch.zeros(4, 1, dtype=torch.int64), 20, vocab_size=1100)
    assert seen.max() < 1100
    ours.save_pretrained("exported")
    again = GPT.from_pretrained("exported")
    assert again.config.vocab_size == 1100 == Tokenizer(again.tokenizer_spec).vocab_size
    idx = torch.arange(8)[None]
    assert torch.equal(again(idx)[0], ours(idx)[0][:, :, :1100])


def test_vocabulary_that_is_named_is_not_padded():
    train.main([*TINY, "--max_iters=1", "--vocab_size=1025"])
    assert checkpoint("out/best.pt")["gpt_config"]["vocab_size"] == 1025


@pytest.mark.parametrize("loss_only, expected", [(False, 2), (True, 1)])
def test_loss_alone_has_one_gradient_and_none_for_the_logits(loss_only, expected):
    """Under torch.compile each output that is returned gets a gradient, of zeros if need be."""
    tangents = []

    @make_boxed_compiler
    def backward(graph, inputs):
        names = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
        tangents.append(sum("tangents" in name for name in names))
        return graph

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = GPT(GPTConfig(8, 17, 1, 2, 16, tied=False))

        def forward(self, idx):
            logits, loss = self.model(idx, idx, loss_only=loss_only)
            return loss if logits is None else (logits, loss)

    compiled = aot_module(Loss(), fw_compiler=lambda graph, inputs: graph, bw_compiler=backward)
    out = compiled(torch.zeros(2, 8, dtype=torch.int64))
    loss = out if loss_only else out[1]
    loss.backward()
    assert tangents == [expected]


def test_loss_alone_is_the_loss():
    torch.manual_seed(0)
    model, idx = GPT(GPTConfig(8, 17, 1, 2, 16)), torch.randint(17, (2, 8))
    logits, loss = model(idx, idx, loss_only=True)
    assert logits is None and torch.equal(loss, model(idx, idx)[1])


# ------------------------------------------------------------------------------------------------
# Checkpoints and files

def same_file(a, b):
    return Path(a).stat().st_ino == Path(b).stat().st_ino


def test_after_the_best_step_both_checkpoints_are_one_file():
    train.main([*TINY, "--max_iters=6"])   # it evaluates at 0 and at 6
    assert same_file("out/ckpt.pt", "out/best.pt")
    train.main([*TINY, "--max_iters=7", "--eval_interval=50", "--init_from=resume"])
    assert checkpoint()["step"] == 7
    assert not list(Path("out").glob("*.tmp"))


def test_checkpoint_that_is_not_the_best_is_a_file_of_its_own(monkeypatch):
    losses = iter([3.0, 2.0, 4.0])
    monkeypatch.setattr(train, "evaluate", lambda *args: next(losses))
    train.main(TINY)
    assert not same_file("out/ckpt.pt", "out/best.pt")
    assert checkpoint()["step"] == 12 and checkpoint("out/best.pt")["step"] == 6


@pytest.mark.parametrize("has_links", [True, False])
def test_second_name_replaces_the_file_it_named(has_links, monkeypatch):
    if not has_links:
        def fail(*args):
            raise OSError("not on this disk")
        monkeypatch.setattr("os.link", fail)
    for name in ("a", "b", "b.tmp"):   # the last one was left by a crash
        Path(name).write_text(name)
    for _ in range(2):
        give_second_name("a", "b")
        assert Path("b").read_text() == "a" and not Path("b.tmp").exists()
    assert same_file("a", "b") == has_links
    Path("a").unlink()
    assert Path("b").read_text() == "a"


def test_each_token_file_is_opened_once(monkeypatch):
    opened = []
    true_open = open

    def note(path, *args, **options):
        opened.append(Path(path).name)
        return true_open(path, *args, **options)
    monkeypatch.setattr("plumbing.token_files.open", note, raising=False)
    train.main(TINY)
    assert sorted(opened) == ["train.bin", "val.bin"]


# ------------------------------------------------------------------------------------------------
# Many processes, several machines

class Later:
    """An all-reduce whose result is there only after wait()"""

    def __init__(self, votes):
        self.votes = votes

    def wait(self):
        self.votes.fill_(1)


def test_flags_of_all_processes_arrive_one_call_later(monkeypatch):
    any_rank = AnyRank()
    assert any_rank.read(True, False, now=False) == (True, False)   # alone: at once
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda votes, op, async_op: Later(votes))
    assert any_rank.read(True, True, now=False) == (False, False)
    any_rank.send(False, False)
    assert any_rank.read(False, False, now=False) == (True, True)   # another process has said so
    assert AnyRank().read(False, False, now=True) == (True, True)


@pytest.mark.parametrize("world, seconds", [(1, 0.02), (8, 0.02), (64, 0.064), (512, 0.512)])
def test_many_processes_ask_the_store_no_more_often_than_few(world, seconds, monkeypatch):
    slept = []
    monkeypatch.setattr(processes.time, "sleep", slept.append)
    group = Group(dist.HashStore(), 0, world)
    wait_until(group, lambda: len(slept) == 3)
    assert slept == [seconds] * 3


@pytest.mark.parametrize("here, world, shape", [
    ("2", 4, (2, 2)), ("4", 4, (4,)), ("1", 4, (4,)), ("8", 16, (2, 8)),
])
def test_models_are_sharded_inside_a_machine_and_copied_between_them(
        here, world, shape, monkeypatch):
    made = []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    monkeypatch.setattr(dist, "get_world_size", lambda: world)
    monkeypatch.setattr(dist, "init_device_mesh",
                        lambda device, shape, mesh_dim_names: made.append((shape, mesh_dim_names)))
    processes.mesh_of_processes("cpu")
    ((found, names),) = made
    assert found == shape and len(names) == len(shape) and names[-1] == "shards"


def train_on_two_machines(*flags):
    both = start_machines(HERE / "train.py", *LONGER, *flags, "--micro_batch_size=3", "--fsdp", n=2)
    assert [process.returncode for process in both] == [0, 0], both[0].err + both[1].err


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--optimizer=muon"]], ids=["adamw", "muon"])
def test_two_machines_of_two_processes_resume_to_the_bit(flags):
    train_on_two_machines(*flags, "--out_dir=whole")
    train_on_two_machines(*flags, "--out_dir=half", "--max_iters=10")
    train_on_two_machines(*flags, "--out_dir=half", "--init_from=resume")
    assert same_state(Path("half"), Path("whole"))


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--optimizer=muon"]], ids=["adamw", "muon"])
def test_two_machines_of_two_processes_have_the_losses_of_one(flags):
    train_on_two_machines(*flags)
    train.main([*LONGER, *flags, "--out_dir=alone"])
    same_course(Path("alone"), Path("out"))
