"""
RoPE on texts longer than those it was trained on: as it is, and five ways to help it. They change
the angles or what is visible, and live here, in an attention written out by hand, not in model.py.

  plain           the angles of training, also past the distances it has seen
  interpolation   every position divided by s (Chen et al. 2023, section 2.3)
  ntk             a larger theta, so that the slowest pair is divided by s and the fastest is not
                  ("NTK-aware", bloc97 2023)
  yarn            pairs that turn often keep their angles, slow ones are divided by s, and the
                  scores are sharpened a little (Peng et al. 2023, section 3)
  window          plain angles, and a window of the trained length
  sinks           the same window, of which 4 tokens are the first of the text; they count as
                  standing just before the others (Xiao et al. 2023, section 3.2)
"""

import math
from contextlib import contextmanager

import torch

from model import Attention, copy_heads, visible

METHODS = ("plain", "interpolation", "ntk", "yarn", "window", "sinks")
SINKS = 4
FEW_TURNS, MANY_TURNS = 1, 32   # YaRN's alpha and beta


def frequencies(method, D, theta, s, trained):
    """The angle per token of each pair, (D/2,). s: how many times the trained length"""
    exponent = torch.arange(0, D, 2) / -D
    if method == "ntk":
        return (theta * s ** (D / (D - 2))) ** exponent
    plain = theta ** exponent
    if method == "interpolation":
        return plain / s
    if method == "yarn":
        turns = trained * plain / (2 * math.pi)
        keep = ((turns - FEW_TURNS) / (MANY_TURNS - FEW_TURNS)).clamp(0, 1)
        return plain * (keep + (1 - keep) / s)
    return plain


def turn(x, pos, freq):
    """What rotate() in model.py does, with any frequencies: x (B,heads,T,D), pos (T,) -> float32"""
    angle = pos[:, None].float() * freq
    cos, sin = angle.cos(), angle.sin()
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def scores_and_mask(q, k, pos, method, theta, s, trained):
    """q (B,H,T,D), k (B,H,T,D), not rotated -> scores (B,H,T,T), mask (T,T)"""
    D = q.shape[-1]
    freq = frequencies(method, D, theta, s, trained)
    keys = turn(k, pos, freq)
    scores = turn(q, pos, freq) @ keys.mT / math.sqrt(D)
    if method == "yarn":
        scores = scores * (0.1 * math.log(s) + 1) ** 2
    if method == "window":
        return scores, visible(pos, pos, trained)
    if method != "sinks":
        return scores, visible(pos, pos, 0)
    recent = visible(pos, pos, trained - SINKS)
    is_sink = (pos < SINKS) & visible(pos, pos, 0)
    # Past the window, a query meets the sinks as if it stood at the window's last place.
    near = turn(q, pos.clamp(max=trained - 1), freq) @ keys.mT / math.sqrt(D)
    return torch.where(is_sink, near, scores), recent | is_sink


@contextmanager
def stretched(method, s, trained):
    """
    Inside the block every Attention uses this method, in training, too. s: how many times the
    trained length the texts have
    """
    original = Attention.forward

    def forward(self, x, pos, layer_cache=None):
        if layer_cache is not None:   # only the sample that train.py prints at its end
            return original(self, x, pos, layer_cache)
        B, T, C = x.shape
        heads = self.c_attn(x).view(B, T, self.H + 2 * self.K, self.D).transpose(1, 2)
        q, k, v = heads.split((self.H, self.K, self.K), dim=1)
        k, v = copy_heads(k, self.H), copy_heads(v, self.H)
        with torch.autocast("cpu", enabled=False):   # scores in float32, as in fused kernels
            scores, mask = scores_and_mask(q, k, pos, method, self.theta, s, trained)
        weight = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1).type_as(v)
        return self.c_proj((weight @ v).transpose(1, 2).reshape(B, T, C))

    Attention.forward = forward
    try:
        yield
    finally:
        Attention.forward = original
