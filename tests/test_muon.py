"""
Muon. The authorities are torch.optim.Muon, where both compute in one dtype, and the singular value
decomposition. Sharded matrices take exactly the steps of whole ones.
"""

import copy

import pytest
import torch
from helpers import PROGRAMS, finish, torchrun

from plumbing.muon import Muon

SHAPES = [(8, 40), (40, 8), (16, 16), (1, 12), (7, 5)]
SETTINGS = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}


def matrices():
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def set_gradients(params, step):
    torch.manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn_like(p)


def test_steps_are_those_of_torch_in_float32(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)   # torch's own dtype for them
    ours, theirs = matrices(), matrices()
    our_muon = Muon(ours, **SETTINGS)
    their_muon = torch.optim.Muon(theirs, **SETTINGS, adjust_lr_fn="match_rms_adamw")
    for step in range(5):
        for params, muon in ((ours, our_muon), (theirs, their_muon)):
            muon.param_groups[0]["lr"] = 0.02 / (1 + step)   # as a schedule does
            set_gradients(params, step)
            muon.step()
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-6), (step, a.shape)


def direction_of_first_step(gradient):
    """The orthogonalised gradient, got back from the step it makes."""
    p = torch.nn.Parameter(torch.zeros_like(gradient))
    p.grad = gradient
    Muon([p], lr=1.0, weight_decay=0.0, momentum=0.0).step()
    return -p.detach() / (0.2 * max(p.shape) ** 0.5)


@pytest.mark.parametrize("rows, columns", [(32, 32), (16, 64), (64, 16)])
def test_update_has_the_gradients_singular_vectors_and_singular_values_near_1(rows, columns):
    torch.manual_seed(0)
    n = min(rows, columns)
    U = torch.linalg.qr(torch.randn(rows, n)).Q
    V = torch.linalg.qr(torch.randn(columns, n)).Q
    for smallest in (1.0, 0.1, 0.03):
        values = torch.logspace(0, torch.tensor(smallest).log10().item(), n)
        direction = direction_of_first_step(U * values @ V.mT)
        inner = U.mT @ direction @ V
        reached = inner.diagonal()
        assert 0.65 < reached.min() and reached.max() < 1.25, smallest
        rest = inner - reached.diag()
        assert rest.abs().max() < 1e-4   # in bfloat16 it would be a hundred times as much


def test_update_does_not_depend_on_the_gradients_scale_and_has_the_rms_of_AdamWs():
    torch.manual_seed(0)
    gradient = torch.randn(24, 48)
    direction = direction_of_first_step(gradient)
    for scale in (1e-4, 1e4):
        assert torch.allclose(direction_of_first_step(gradient * scale), direction, atol=1e-4)
    update = direction * 0.2 * 48 ** 0.5
    assert update.square().mean().sqrt() == pytest.approx(0.2, rel=0.25)


def test_gradient_of_zeros_leaves_weight_decay_alone():
    p = torch.nn.Parameter(torch.ones(4, 6))
    p.grad = torch.zeros_like(p)
    Muon([p], **SETTINGS).step()
    assert torch.allclose(p, torch.full_like(p, 1 - 0.02 * 0.1))


def test_resumed_state_continues_to_the_bit():
    whole = matrices()
    muon = Muon(whole, **SETTINGS)
    for step in range(6):
        if step == 3:
            resumed = copy.deepcopy(whole)
            saved = copy.deepcopy(muon.state_dict())
        set_gradients(whole, step)
        muon.step()
    assert all(state.keys() == {"momentum_buffer"} for state in saved["state"].values())

    again = Muon(resumed, lr=1.0, weight_decay=0.0, momentum=0.0)
    again.load_state_dict(saved)
    for step in range(3, 6):
        set_gradients(resumed, step)
        again.step()
    for a, b in zip(whole, resumed, strict=True):
        assert torch.equal(a, b)


def test_sharded_steps_equal_whole_ones_to_the_bit():
    process = torchrun(PROGRAMS / "muon_sharded.py", n=3)
    out, _ = finish(process)
    assert process.returncode == 0, process.err
    assert out == "equal over 2 processes\nequal over 3 processes\n"
