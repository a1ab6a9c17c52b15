"""
The specification of model.py, in its order: read a section there, then here what it promises.

The authorities are transformers' GPT-2, StarCoder2 and logits processors, torch's FLOP counter, and
definitions written out by hand. Other tests use degenerate equality: a window no shorter than the
text is full attention, as many key/value heads as query heads is multi-head attention, and a cache
changes nothing but the time.
"""

import dataclasses
import functools
import itertools
import math

import pytest
import torch
import transformers
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import (
    GPT,
    GPTConfig,
    Linear,
    attend,
    attend_in_blocks,
    keys_per_query,
    rotate,
    sample,
    visible,
)

transformers.logging.set_verbosity_error()

V = 101
TINY = {"block_size": 32, "vocab_size": V, "n_layer": 3, "n_head": 4, "n_embd": 32}
W = 5

ROPE = {"use_rope": True}
GQA = {"use_gqa": True, "n_kv_head": 2}
SWA = {"use_swa": True, "window_size": W}
MIXED_WINDOWS = {"use_rope": True, "use_swa": True, "window_size": (W, 0, 2 * W)}

VARIANTS = {
    "gpt2": {},
    "rope": ROPE,
    "gqa": GQA,
    "swa": SWA,
    "rope+gqa": ROPE | GQA,
    "rope+swa": ROPE | SWA,
    "gqa+swa": GQA | SWA,
    "rope+gqa+swa": ROPE | GQA | SWA,
}
every_variant = pytest.mark.parametrize("switches", VARIANTS.values(), ids=VARIANTS.keys())


def shake(model, size=0.1):
    """Add noise to every tensor: biases start at zero, where an error in them would not show."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * size)
    return model.eval()


def tiny(**changes):
    torch.manual_seed(0)
    return shake(GPT(GPTConfig(**{**TINY, **changes})))


def tokens(B, T, V=V, seed=2):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def change_token(idx, j):
    """The same tokens, with another one at position j."""
    idx = idx.clone()
    idx[:, j] = (idx[:, j] + 1) % V
    return idx


# ------------------------------------------------------------------------------------------------
# The configuration

@pytest.mark.parametrize(
    "fields, message",
    [
        ({"n_layer": 0}, "n_layer=0"),
        ({"n_layer": 2.0}, "n_layer=2.0"),
        ({"vocab_size": -1}, "vocab_size=-1"),
        ({"block_size": 0}, "block_size=0"),
        ({"n_embd": 100, "n_head": 3}, "n_embd=100.*n_head=3"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"dropout": math.nan}, "dropout=nan"),
        ({"use_rope": True, "n_embd": 36}, "n_embd=36.*n_head=12"),
        ({"use_rope": True, "rope_theta": 0.0}, "rope_theta=0.0"),
        ({"use_rope": True, "rope_theta": math.nan}, "rope_theta=nan"),
        ({"rope_theta": 500.0}, "rope_theta=500.0.*use_rope"),
        ({"n_kv_head": 4}, "use_gqa=False.*n_kv_head=4"),
        ({"use_gqa": True}, "use_gqa=True.*n_kv_head=None"),
        ({"use_gqa": True, "n_kv_head": 0}, "n_kv_head=0"),
        ({"use_gqa": True, "n_kv_head": 5}, "n_kv_head=5.*n_head=12|n_head=12.*n_kv_head=5"),
        ({"use_gqa": True, "n_kv_head": 24}, "n_kv_head=24"),
        ({"use_gqa": True, "n_kv_head": 4.0}, "n_kv_head=4.0"),
        ({"window_size": 8}, "use_swa=False.*window_size=8"),
        ({"use_swa": True}, "use_swa=True.*window_size=None"),
        ({"use_swa": True, "window_size": -1}, "window_size=-1"),
        ({"use_swa": True, "window_size": 2.5}, "window_size=2.5"),
        ({"use_swa": True, "window_size": (8,) * 11}, "window_size=.*n_layer=12"),
        ({"use_swa": True, "window_size": (8,) * 11 + (-8,)}, "window_size="),
    ],
)
def test_contradictory_config_is_an_error_that_names_the_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**fields)


@pytest.mark.parametrize(
    "switches, windows",
    [
        ({}, (0, 0, 0)),
        ({"use_swa": True, "window_size": W}, (W, W, W)),
        ({"use_swa": True, "window_size": 0}, (0, 0, 0)),
        ({"use_swa": True, "window_size": (W, 0, 2)}, (W, 0, 2)),
        ({"use_swa": True, "window_size": [W, 0, 2]}, (W, 0, 2)),
    ],
)
def test_windows_are_one_per_layer_and_0_is_full_attention(switches, windows):
    model = tiny(**switches)
    assert model.config.windows == windows
    assert tuple(block.attn.window for block in model.h) == windows


# ------------------------------------------------------------------------------------------------
# RoPE

def test_rotation_is_a_product_of_complex_numbers():
    """RoFormer, equation 12: the pair (a, b) is a + ib, times exp(i * pos * theta^(-2d/D))."""
    theta = 10_000.0
    x = torch.randn(2, 3, 7, 8)
    pos = torch.tensor([0, 1, 2, 50, 51, 1000, 30_000])
    pairs = torch.complex(x[..., :4].double(), x[..., 4:].double())
    angle = pos[:, None].double() * theta ** (-2 * torch.arange(4).double() / 8)
    turned = pairs * torch.exp(1j * angle)
    expected = torch.cat((turned.real, turned.imag), -1).float()
    rotated = rotate(x, pos, theta)
    assert torch.allclose(rotated[:, :, :4], expected[:, :, :4], atol=2e-5)
    assert torch.allclose(rotated, expected, atol=5e-3)   # float32 has no finer angle at 30,000


def scores(q, k, query_pos, key_pos):
    """The products of one query and one key vector placed at all of these positions."""
    q = rotate(q.expand(1, 1, len(query_pos), -1), query_pos, 100.0)
    k = rotate(k.expand(1, 1, len(key_pos), -1), key_pos, 100.0)
    return (q @ k.mT)[0, 0]


def test_rope_scores_depend_on_relative_position_only_and_on_every_step_of_it():
    torch.manual_seed(0)
    q, k = torch.randn(16), torch.randn(16)
    pos = torch.arange(20)
    score = scores(q, k, pos, pos)
    for distance in range(-19, 20):
        assert score.diagonal(distance).std(unbiased=False) < 1e-5
    for shift in (1, 7, 100):
        assert torch.allclose(scores(q, k, pos + shift, pos + shift), score, atol=1e-4)
        assert (scores(q, k, pos + shift, pos) - score).abs().max() > 0.1


def test_rotation_keeps_lengths_and_leaves_position_0_alone():
    x = torch.randn(1, 2, 30, 8)
    rotated = rotate(x, torch.arange(30), 10_000.0)
    assert torch.allclose(rotated.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
    assert torch.equal(rotated[:, :, 0], x[:, :, 0])


def test_bfloat16_is_rotated_in_float32():
    x = torch.randn(1, 1, 2, 8).bfloat16()
    pos = torch.tensor([4096, 4097])   # in bfloat16 these are one number
    rotated = rotate(x, pos, 10_000.0)
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated, rotate(x.float(), pos, 10_000.0).bfloat16())


def test_rope_replaces_learned_positions_and_reads_past_block_size():
    rope = tiny(use_rope=True)
    assert "wpe.weight" not in rope.state_dict()
    assert tiny().num_params() - rope.num_params() == 32 * 32
    assert rope(tokens(1, 100))[0].shape == (1, 100, V)


# ------------------------------------------------------------------------------------------------
# Who sees whom

@pytest.mark.parametrize("window", [0, 1, 3, 10, 100])
def test_visible_is_the_definition(window):
    queries, keys = range(4, 12), range(12)
    seen = visible(torch.tensor(queries), torch.tensor(keys), window)
    for (row, i), (column, j) in itertools.product(enumerate(queries), enumerate(keys)):
        within = 0 <= i - j and (window == 0 or i - j < window)
        assert seen[row, column] == within, (i, j)


@every_variant
def test_future_never_leaks_into_the_past(switches):
    model, idx = tiny(**switches), tokens(2, 32)
    changed = idx.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % V
    before, after = model(idx)[0], model(changed)[0]
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20], after[:, 20])


# ------------------------------------------------------------------------------------------------
# Attention, and grouped-query attention

def attention_by_hand(q, k, v, seen):
    """softmax(q k' / sqrt(D)) v in float64, one head at a time; seen (T,S) says who sees whom."""
    B, H, _, D = q.shape
    queries_per_key = H // k.shape[1]
    heads = []
    for h in range(H):
        q_h = q[:, h].double()
        k_h = k[:, h // queries_per_key].double()
        v_h = v[:, h // queries_per_key].double()
        score = q_h @ k_h.mT / math.sqrt(D)
        weight = score.masked_fill(~seen, -torch.inf).softmax(-1)
        heads.append(weight @ v_h)
    return torch.stack(heads, dim=1).float()


def qkv(K, T, S, B=2, H=4, D=8):
    torch.manual_seed(0)
    return torch.randn(B, H, T, D), torch.randn(B, K, S, D), torch.randn(B, K, S, D)


@pytest.mark.parametrize("K", [1, 2, 4])
def test_attend_is_softmax_by_hand(K):
    q, k, v = qkv(K, T=6, S=6)
    pos = torch.arange(6)
    causal = visible(pos, pos, 0)
    windowed = visible(pos, pos, 3)
    everything = torch.ones(6, 6, dtype=torch.bool)
    for seen, result in (
        (causal, attend(q, k, v, causal=True)),
        (windowed, attend(q, k, v, mask=windowed)),
        (everything, attend(q, k, v)),
    ):
        assert torch.allclose(result, attention_by_hand(q, k, v, seen), atol=1e-6)


@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("T", [1, 3])
def test_attend_without_a_mask_sees_every_key_of_a_cache(T, K):
    q, k, v = qkv(K, T=T, S=7)
    everything = torch.ones(T, 7, dtype=torch.bool)
    expected = attention_by_hand(q, k, v, everything)
    assert torch.allclose(attend(q, k, v), expected, atol=1e-6)


def repeated_heads(grouped):
    """The multi-head model in which every query head has a copy of the key/value head it shared."""
    c = grouped.config
    H, K = c.n_head, c.n_kv_head
    tensors = dict(grouped.state_dict())
    for name, t in tensors.items():
        if ".c_attn." in name:
            q, k, v = t.unflatten(0, (H + 2 * K, -1)).split((H, K, K))
            copies = [heads[[h * K // H for h in range(H)]] for heads in (k, v)]
            tensors[name] = torch.cat((q, *copies)).flatten(0, 1)
    model = GPT(dataclasses.replace(c, use_gqa=False, n_kv_head=None)).eval()
    model.load_state_dict(tensors)
    return model


@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("others", [{}, ROPE, SWA], ids=["alone", "rope", "swa"])
def test_gqa_equals_multi_head_with_repeated_heads(K, others):
    grouped, idx = tiny(use_gqa=True, n_kv_head=K, **others), tokens(2, 32)
    assert torch.allclose(grouped(idx)[0], repeated_heads(grouped)(idx)[0], atol=1e-5)


def test_n_kv_head_equal_to_n_head_is_multi_head():
    grouped, plain, idx = tiny(use_gqa=True, n_kv_head=4), tiny(), tokens(2, 32)
    plain.load_state_dict(grouped.state_dict())
    assert torch.equal(grouped(idx)[0], plain(idx)[0])


# ------------------------------------------------------------------------------------------------
# Sliding windows, in blocks

@pytest.mark.parametrize("T", [9, 15, 16, 17, 24, 50])
@pytest.mark.parametrize("K", [1, 2, 4])
def test_blocks_equal_the_mask_forward_and_backward(T, K):
    window = 8
    q, k, v = (t.requires_grad_() for t in qkv(K, T=T, S=T))
    weight = torch.randn_like(q)
    pos = torch.arange(T)
    blocked = attend_in_blocks(q, k, v, window)
    masked = attend(q, k, v, mask=visible(pos, pos, window))
    assert torch.allclose(blocked, masked, atol=1e-5)
    blocked_grads = torch.autograd.grad((blocked * weight).sum(), (q, k, v))
    masked_grads = torch.autograd.grad((masked * weight).sum(), (q, k, v))
    for a, b in zip(blocked_grads, masked_grads, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_blocks_of_grouped_heads_keep_neither_q_nor_k_nor_v_for_the_gradient():
    q, k, v = (t.requires_grad_() for t in qkv(K=2, T=20, S=20, B=1, H=4, D=4))
    kept = set()

    def keep(t):
        kept.add(t.untyped_storage().data_ptr())
        return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        attend_in_blocks(q, k, v, 6)
    assert len(kept) > 8   # of four blocks
    assert not kept & {t.untyped_storage().data_ptr() for t in (q, k, v)}


def has_the_mean_of_that_without_dropout(form):
    q, k, v = qkv(K=2, T=20, S=20, B=1, H=2, D=4)
    expected = form(q, k, v, dropout=0.0)
    many = [t.expand(4000, -1, -1, -1) for t in (q, k, v)]
    drawn = form(*many, dropout=0.3)
    assert drawn.std(0).min() > 0.01
    assert torch.allclose(drawn.mean(0), expected[0], atol=0.1)


@pytest.mark.parametrize("causal", [True, False])
def test_attend_under_dropout_has_the_mean_of_that_without(causal):
    has_the_mean_of_that_without_dropout(functools.partial(attend, causal=causal))


def test_blocks_under_dropout_have_the_mean_of_those_without():
    has_the_mean_of_that_without_dropout(functools.partial(attend_in_blocks, window=6))


@pytest.mark.parametrize("T", [1, 7, 8, 9, 16, 17, 50])
def test_keys_per_query_counts_what_attention_computes(T, monkeypatch):
    computed = []
    real = F.scaled_dot_product_attention

    def counting(q, k, v, *arguments, **options):
        computed.append(q.shape[2] * k.shape[2])
        return real(q, k, v, *arguments, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counting)
    for window in (0, 8, 100):
        computed.clear()
        tiny(n_layer=1, n_head=1, block_size=50, use_swa=True, window_size=window)(tokens(1, T))
        assert sum(computed) / T == pytest.approx(keys_per_query(T, window)), window


def test_blocks_compute_at_most_two_windows_of_keys_per_query():
    for T in range(1, 100):
        for window in (1, 4, 7):
            assert min(T, window) <= keys_per_query(T, window) <= 2 * window
        assert keys_per_query(T, 0) == T


@pytest.mark.parametrize("switches", [SWA, ROPE | GQA | SWA], ids=["swa", "rope+gqa+swa"])
def test_window_sees_exactly_W_keys(switches):
    model, idx, i = tiny(n_layer=1, **switches), tokens(1, 32), 20
    before = model(idx)[0][0, i]
    for j in range(32):
        after = model(change_token(idx, j))[0][0, i]
        outside = not 0 <= i - j < W
        assert torch.equal(after, before) == outside, j   # outside, not one bit changes


def test_receptive_field_after_L_layers_is_L_times_W_minus_1_plus_1():
    model, idx, i = tiny(**SWA), tokens(1, 32), 30
    before = model(idx)[0][0, i]
    seen = [j for j in range(32) if not torch.equal(model(change_token(idx, j))[0][0, i], before)]
    assert len(seen) == 3 * (W - 1) + 1


@pytest.mark.parametrize("window", [32, 33, 1000, 0, (0, 0, 0), (40, 0, 32)])
def test_window_no_shorter_than_the_text_is_full_attention(window):
    windowed, full, idx = tiny(use_swa=True, window_size=window), tiny(), tokens(2, 32)
    assert torch.equal(windowed(idx)[0], full(idx)[0])


# ------------------------------------------------------------------------------------------------
# The cache

def read_in_chunks(model, idx, sizes, cache):
    """The logits of idx, read through cache in chunks of these sizes."""
    chunks = idx.split(sizes, dim=1)
    return torch.cat([model(chunk, cache=cache)[0] for chunk in chunks], dim=1)


def stored_tensors(cache):
    return [t for layer in cache.layers for t in (layer.k, layer.v)]


@torch.no_grad()
def test_ring_holds_the_last_W_positions():
    cache = tiny(n_layer=1, use_swa=True, window_size=4).new_cache(1)
    model = tiny(n_layer=1, use_swa=True, window_size=4)
    slots = []
    for token in tokens(1, 7).split(1, dim=1):
        model(token, cache=cache)
        slots.append(cache.layers[0].pos.tolist())
    assert slots == [
        [0, -1, -1, -1],
        [0, 1, -1, -1],
        [0, 1, 2, -1],
        [0, 1, 2, 3],
        [4, 1, 2, 3],
        [4, 5, 2, 3],
        [4, 5, 6, 3],
    ]


@every_variant
@pytest.mark.parametrize("chunk", [1, 3, W - 1, W, W + 1, 32])
@torch.no_grad()
def test_cached_equals_uncached_in_chunks_past_several_wraps(switches, chunk):
    model = tiny(**switches)
    for text in (tokens(3, 32), tokens(3, 29, seed=7)):
        cache = model.new_cache(3)
        logits = read_in_chunks(model, text, chunk, cache)
        assert torch.allclose(logits, model(text)[0], atol=1e-5)
        assert cache.length == text.shape[1]


@pytest.mark.parametrize(
    "switches",
    [ROPE | {"block_size": 150}, ROPE | GQA | SWA, MIXED_WINDOWS | {"block_size": 150}],
    ids=["full attention", "a window in every layer", "both kinds of layer"],
)
@torch.no_grad()
def test_cached_equals_uncached_in_chunks_of_every_size_in_turn(switches):
    sizes = (1, 7, 1, 1, 2, 20, 1, 5, 4, 6, 70, 1, 1, 30)
    model, idx = tiny(**switches), tokens(2, sum(sizes))
    logits = read_in_chunks(model, idx, sizes, model.new_cache(2))
    assert torch.allclose(logits, model(idx)[0], atol=1e-5)


@torch.no_grad()
def test_cache_holds_K_heads_in_W_or_block_size_slots():
    D, bytes_per_value, B = 8, 4, 2

    def stored_bytes(switches, T=32):
        model = tiny(**switches)
        cache = model.new_cache(B)
        read_in_chunks(model, tokens(B, T), 4, cache)
        return sum(t.numel() * t.element_size() for t in stored_tensors(cache))

    def expected(K, slots):
        keys_and_values = 2
        return keys_and_values * B * K * sum(slots) * D * bytes_per_value

    assert stored_bytes(ROPE) == expected(K=4, slots=(32, 32, 32))
    assert stored_bytes(ROPE | GQA) == expected(K=2, slots=(32, 32, 32))
    assert stored_bytes(ROPE | SWA) == expected(K=4, slots=(W, W, W))
    assert stored_bytes(ROPE | SWA, T=1000) == expected(K=4, slots=(W, W, W))
    assert stored_bytes(MIXED_WINDOWS) == expected(K=4, slots=(W, 32, 2 * W))


@every_variant
@torch.no_grad()
def test_cache_is_allocated_once(switches):
    model, idx = tiny(**switches), tokens(1, 32)
    cache = model.new_cache(1)
    model(idx[:, :3], cache=cache)
    addresses = [t.data_ptr() for t in stored_tensors(cache)]
    read_in_chunks(model, idx[:, 3:], 4, cache)
    assert [t.data_ptr() for t in stored_tensors(cache)] == addresses


@pytest.mark.parametrize(
    "switches", [{}, SWA, ROPE, ROPE | GQA, MIXED_WINDOWS],
    ids=["gpt2", "swa", "rope", "rope+gqa", "both kinds of layer"],
)
@torch.no_grad()
def test_cache_refuses_more_than_block_size_tokens_and_stays_as_it_was(switches):
    model, idx = tiny(**switches), tokens(1, 32)
    cache = model.new_cache(1)
    model(idx[:, :30], cache=cache)
    with pytest.raises(ValueError, match="33 tokens.*block_size=32"):
        model(tokens(1, 3), cache=cache)
    assert cache.length == 30
    logits = model(idx[:, 30:], cache=cache)[0]
    assert torch.allclose(logits, model(idx)[0][:, 30:], atol=1e-5)


def test_cache_keeps_no_history_of_gradients():
    model = tiny()
    cache = model.new_cache(1)
    for _ in range(3):
        model(tokens(1, 3), cache=cache)
    assert not any(t.requires_grad for t in stored_tensors(cache))


def test_cache_of_another_batch_size_or_model_is_refused():
    model, other = tiny(), tiny(n_layer=2)
    with pytest.raises(ValueError, match="batch size.*2.*3"):
        model(tokens(3, 4), cache=model.new_cache(2))
    with pytest.raises(ValueError, match="another model"):
        model(tokens(3, 4), cache=other.new_cache(3))


# ------------------------------------------------------------------------------------------------
# The model

@pytest.mark.parametrize(
    "n_layer, n_head, n_embd, parameters",
    [
        (12, 12, 768, 124_439_808),
        (24, 16, 1024, 354_823_168),
        (36, 20, 1280, 774_030_080),
        (48, 25, 1600, 1_557_611_200),
    ],
    ids=["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"],
)
def test_number_of_parameters_of_the_four_released_sizes(n_layer, n_head, n_embd, parameters):
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd))
    assert model.num_params() == parameters


def test_embedding_and_head_are_one_tensor_unless_untied():
    tied, untied = tiny(), tiny(tied=False)
    assert tied.lm_head.weight is tied.wte.weight
    assert len(list(tied.parameters())) == 2 + 3 * 12 + 2
    assert untied.lm_head.weight is not untied.wte.weight
    assert untied.num_params() == tied.num_params() + V * 32


def test_without_bias_there_is_none():
    assert not [name for name, _ in tiny(bias=False).named_parameters() if name.endswith("bias")]


def test_initialisation_scales_residual_projections_by_depth():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=8, n_embd=128, n_head=4, vocab_size=1000))
    for name, p in model.named_parameters():
        if name.endswith("c_proj.weight"):
            assert p.std().item() == pytest.approx(0.02 / math.sqrt(2 * 8), rel=0.05), name
        elif p.dim() == 2:
            assert p.std().item() == pytest.approx(0.02, rel=0.05), name
        elif name.endswith("weight"):   # of a layer norm
            assert torch.equal(p, torch.ones_like(p)), name
        else:
            assert torch.equal(p, torch.zeros_like(p)), name


def test_initial_loss_is_that_of_a_uniform_guess():
    torch.manual_seed(0)
    _, loss = GPT(GPTConfig(**TINY))(tokens(8, 32), tokens(8, 32, seed=3))
    assert loss.item() == pytest.approx(math.log(V), abs=0.1)


def test_target_of_minus_one_does_not_count():
    model, idx, targets = tiny(), tokens(1, 8), tokens(1, 8, seed=3)
    targets[0, :5] = -1
    logits, loss = model(idx, targets)
    expected = F.cross_entropy(logits[0, 5:], targets[0, 5:])
    assert loss.item() == pytest.approx(expected.item())


def test_more_tokens_than_positions_is_an_error_before_any_kernel():
    with pytest.raises(ValueError, match="33 tokens.*block_size=32"):
        tiny()(tokens(1, 33))


def test_dropout_acts_in_training_only():
    model, idx = tiny(dropout=0.5), tokens(1, 8)
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


@pytest.mark.parametrize("T", [4, 23, 32])
@pytest.mark.parametrize(
    "switches", [*VARIANTS.values(), {"tied": False}], ids=[*VARIANTS.keys(), "untied"])
def test_flops_per_token_is_what_torch_counts(T, switches):
    model = tiny(**switches)
    plain_kernel = sdpa_kernel(SDPBackend.MATH)   # the counter cannot see into the fused ones
    with FlopCounterMode(display=False) as counter, plain_kernel:
        model(tokens(2, T), tokens(2, T))[1].backward()
    assert counter.get_total_flops() / (2 * T) == pytest.approx(model.flops_per_token(T), rel=1e-9)


def same_gradients_compiled(backend):
    model, idx = tiny(n_layer=1, **(ROPE | GQA | SWA)).train(), tokens(2, 23)
    model(idx, idx)[1].backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend=backend)(idx, idx)[1].backward()
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, expected[name], atol=1e-5), name


def test_all_switches_trace_without_a_break_and_give_the_same_gradients():
    same_gradients_compiled("aot_eager")


@pytest.mark.slow
def test_all_switches_compile_to_the_same_gradients():
    same_gradients_compiled("inductor")


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("out", [64, 96, 97, 1])   # 97 is prime
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_treat_a_single_token_as_any_other(out, bias, dtype, tolerance):
    torch.manual_seed(0)
    layer = Linear(32, out, bias=bias).to(dtype)
    x = torch.randn(5, 1, 32, dtype=dtype)
    together = torch.nn.functional.linear(x, layer.weight, layer.bias)
    for i in range(5):
        alone = layer(x[i:i + 1])
        assert alone.shape == (1, 1, out) and alone.dtype == dtype
        assert torch.allclose(alone, together[i:i + 1], atol=tolerance)
    assert layer(x[0]).shape == (1, out)


@pytest.mark.parametrize("device, dtype, uses_parts", [
    ("cpu", torch.float32, True), ("cpu", torch.bfloat16, False), ("meta", torch.float32, False),
])
def test_parts_are_for_float32_on_a_CPU(device, dtype, uses_parts, monkeypatch):
    used = []
    monkeypatch.setattr(Linear, "in_parts", lambda self, x: used.append(x) or x)
    Linear(32, 32, device=device, dtype=dtype)(torch.zeros(1, 1, 32, device=device, dtype=dtype))
    assert bool(used) == uses_parts


# ------------------------------------------------------------------------------------------------
# Generation

@torch.no_grad()
def likeliest_next(model, idx):
    return model(idx)[0][:, -1].argmax(-1)


def test_greedy_takes_the_likeliest_token():
    model, idx = tiny(), tokens(2, 5)
    out = model.generate(idx, 10, temperature=0)
    assert out.shape == (2, 15)
    assert torch.equal(out[:, :5], idx)
    for t in range(5, 15):
        assert torch.equal(out[:, t], likeliest_next(model, out[:, :t]))


@every_variant
def test_greedy_generation_is_that_without_a_cache(switches):
    model, idx = tiny(**switches), tokens(2, 6)
    out = model.generate(idx, 60, temperature=0)
    slides_forever = model.config.use_rope and model.config.use_swa
    for t in (6, 7, 20, 31, 32, 33, 40, 65):
        first = 0 if slides_forever else max(0, t - 32)
        assert torch.equal(out[:, t], likeliest_next(model, out[:, first:t])), t


def test_past_block_size_it_sees_the_last_block_size_tokens():
    for switches in ({}, ROPE, MIXED_WINDOWS):
        model, idx = tiny(**switches), tokens(1, 30)
        out = model.generate(idx, 20, temperature=0)
        for t in range(33, 50):
            assert torch.equal(out[:, t], likeliest_next(model, out[:, t - 32:t]))


def test_prompt_longer_than_block_size_is_cut_on_the_left():
    model, idx = tiny(), tokens(1, 50)
    whole = model.generate(idx, 5, temperature=0)
    cut = model.generate(idx[:, -32:], 5, temperature=0)
    assert torch.equal(whole[:, 50:], cut[:, 32:])


def test_lowest_temperature_is_greedy():
    model, idx = tiny(), tokens(2, 6)
    coldest = model.generate(idx, 10, temperature=1e-40)
    assert torch.equal(coldest, model.generate(idx, 10, temperature=0))


def test_rows_of_a_batch_are_independent():
    model, idx = tiny(), tokens(3, 6)
    out = model.generate(idx, 12, temperature=0)
    for row in range(3):
        alone = model.generate(idx[row:row + 1], 12, temperature=0)
        assert torch.equal(out[row:row + 1], alone)


@pytest.mark.parametrize("rows", [1, 2])
def test_row_that_reaches_the_stop_token_stays_stopped(rows):
    model, idx = tiny(), tokens(2, 6)[:rows]

    def draw(**arguments):
        torch.manual_seed(5)
        return model.generate(idx, 12, temperature=3.0, **arguments)

    free = draw()
    stop = free[0, 9].item()
    end = free[0, 6:].tolist().index(stop) + 6
    assert (free[0, end:] != stop).any()   # without a stop token this row would go on
    assert not (free[1:] == stop).any()   # and the other row never meets it

    stopped = draw(stop_token=stop)
    assert torch.equal(stopped[0, :end + 1], free[0, :end + 1])
    assert (stopped[0, end:] == stop).all()
    every_row_has_stopped = rows == 1
    assert stopped.shape[1] == (end + 1 if every_row_has_stopped else 18)


def test_stream_yields_what_generate_returns():
    model, idx = tiny(), tokens(2, 6)
    torch.manual_seed(5)
    out = model.generate(idx, 9)
    torch.manual_seed(5)
    columns = list(model.stream(idx, 9))
    assert torch.equal(torch.cat(columns, dim=1), out[:, 6:])


@pytest.mark.parametrize(
    "temperature, top_k, top_p",
    [
        (1.0, None, None),
        (0.7, None, None),
        (1.0, 5, None),
        (1.0, None, 0.6),
        (1.3, 20, 0.8),
        (1.0, 1000, 1.0),
        (1.0, None, 1e-6),
    ],
)
def test_sampling_follows_the_distribution_of_transformers(temperature, top_k, top_p):
    logits = 2 * torch.randn(1, 30, generator=torch.Generator().manual_seed(0))
    theirs = transformers.TemperatureLogitsWarper(temperature)(None, logits)
    if top_k is not None:
        theirs = transformers.TopKLogitsWarper(top_k)(None, theirs)
    if top_p is not None and top_p < 1:
        theirs = transformers.TopPLogitsWarper(top_p)(None, theirs)
    expected = theirs.softmax(-1)[0]

    torch.manual_seed(0)
    drawn = sample(logits.expand(200_000, -1), temperature, top_k, top_p).flatten()
    measured = drawn.bincount(minlength=30) / len(drawn)
    assert (measured[expected == 0] == 0).all()
    assert torch.allclose(measured, expected, atol=0.005)


def test_top_p_of_1_excludes_nothing(monkeypatch):
    seen = []

    def multinomial(p, num_samples):
        seen.append(p)
        return p.argmax(-1, keepdim=True)

    monkeypatch.setattr(torch, "multinomial", multinomial)
    logits = 3 * torch.randn(4, 50257, generator=torch.Generator().manual_seed(0))
    sample(logits, 1.0, None, 1.0)
    assert (seen[0] > 0).all()   # a running sum in float32 passes 1 thousands of tokens too early


def test_padding_of_the_vocabulary_is_never_sampled():
    out = tiny().generate(tokens(50, 4, V=10), 20, temperature=5.0, vocab_size=10)
    assert (out < 10).all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"temperature": -1}, "temperature=-1"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
    ],
)
def test_sampling_arguments_out_of_range_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny().generate(tokens(1, 4), 1, **arguments)


def test_empty_prompt_is_an_error():
    with pytest.raises(ValueError, match="empty"):
        tiny().generate(torch.zeros(1, 0, dtype=torch.long), 1)


# ------------------------------------------------------------------------------------------------
# Loading: equal to GPT-2

def hf_gpt2(**changes):
    """transformers' GPT-2 of TINY's shape, with random weights of a size at which errors show."""
    torch.manual_seed(1)
    shape = {"n_positions": 32, "vocab_size": V, "n_layer": 3, "n_head": 4, "n_embd": 32}
    return shake(transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **changes)))


def loaded(theirs, folder):
    """Our model with the weights of theirs, by way of a folder."""
    theirs.save_pretrained(folder)
    return GPT.from_pretrained(folder)


@torch.no_grad()
def difference(ours, theirs, idx):
    return (ours(idx)[0] - theirs(idx).logits).abs().max().item()


def greedy_text_of_transformers(theirs, idx, n):
    return theirs.generate(
        idx,
        attention_mask=torch.ones_like(idx),
        max_new_tokens=n,
        min_new_tokens=n,
        do_sample=False,
    )


def test_GPTConfig_is_GPT2_124M_with_the_logits_and_the_text_of_transformers(tmp_path):
    torch.manual_seed(0)
    ours, idx = shake(GPT(GPTConfig()), size=0.02), tokens(1, 200, 50257)
    ours.save_pretrained(tmp_path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    released = transformers.GPT2Config()
    for key in ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd", "tie_word_embeddings",
                "activation_function", "layer_norm_epsilon", "bos_token_id", "eos_token_id"):
        assert getattr(theirs.config, key) == getattr(released, key), key
    assert difference(ours, theirs, idx) <= 1e-4
    prompt = idx[:, :8]
    text = ours.generate(prompt, 24, temperature=0)
    assert torch.equal(text, greedy_text_of_transformers(theirs, prompt, 24))


def test_loss_and_gradients_equal_transformers(tmp_path):
    theirs, idx = hf_gpt2(), tokens(3, 20)
    ours = loaded(theirs, tmp_path)
    loss = ours(idx[:, :-1], idx[:, 1:])[1]
    their_loss = theirs(idx, labels=idx).loss
    assert loss.item() == pytest.approx(their_loss.item(), rel=1e-5)

    loss.backward()
    their_loss.backward()
    their_parameters = dict(theirs.transformer.named_parameters())
    for name, p in ours.named_parameters():
        expected = their_parameters.pop(name).grad
        if name.startswith("h.") and p.dim() == 2:
            expected = expected.t()   # GPT-2 was released with weights of shape (in, out)
        assert torch.allclose(p.grad, expected, atol=1e-6), name
    assert not their_parameters


# ------------------------------------------------------------------------------------------------
# Loading: equal to StarCoder2, which is GPT-2 with the three switches on

def hf_starcoder2(shape=TINY, K=2, window=None, noise=0.1, **changes):
    torch.manual_seed(1)
    fields = {
        "vocab_size": shape["vocab_size"],
        "hidden_size": shape["n_embd"],
        "intermediate_size": 4 * shape["n_embd"],
        "num_hidden_layers": shape["n_layer"],
        "num_attention_heads": shape["n_head"],
        "num_key_value_heads": K,
        "max_position_embeddings": shape["block_size"],
        "sliding_window": window,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    }
    plainest = {"attn_implementation": "eager"}
    config = transformers.Starcoder2Config(**(fields | changes | plainest))
    return shake(transformers.Starcoder2ForCausalLM(config), noise)


@pytest.mark.parametrize(
    "K, window",
    [
        pytest.param(4, 64, id="rope+gqa+swa, W < T"),
        pytest.param(12, None, id="rope", marks=pytest.mark.slow),
        pytest.param(4, None, id="rope+gqa", marks=pytest.mark.slow),
        pytest.param(1, 300, id="W = T", marks=pytest.mark.slow),
        pytest.param(4, 301, id="W > T", marks=pytest.mark.slow),
    ],
)
def test_twelve_layers_of_768_are_equal_to_starcoder2(tmp_path, K, window):
    shape = dataclasses.asdict(GPTConfig(vocab_size=1000))
    theirs = hf_starcoder2(shape, K, window, noise=0.02)
    ours = loaded(theirs, tmp_path)
    switches = {"use_rope": True, "rope_theta": 500.0, "use_gqa": True, "n_kv_head": K}
    if window is not None:
        switches |= {"use_swa": True, "window_size": window}
    assert ours.config == GPTConfig(vocab_size=1000, **switches)
    assert difference(ours, theirs, tokens(1, 300, 1000)) <= 1e-4


@pytest.mark.parametrize("T", [1, W - 1, W, W + 1, 2 * W, 31, 32])
@pytest.mark.parametrize("K, window", [(4, None), (2, None), (1, W), (2, W), (4, 1), (2, 31)])
def test_equal_to_starcoder2_at_every_length(tmp_path, K, window, T):
    theirs = hf_starcoder2(K=K, window=window)
    assert difference(loaded(theirs, tmp_path), theirs, tokens(2, T)) < 1e-5


def test_greedy_text_equals_starcoder2_far_past_the_window(tmp_path):
    theirs, idx = hf_starcoder2(window=W), tokens(2, 7)
    text = loaded(theirs, tmp_path).generate(idx, 60, temperature=0)
    assert torch.equal(text, greedy_text_of_transformers(theirs, idx, 60))


# ------------------------------------------------------------------------------------------------
# Saving

def test_round_trip_is_exact(tmp_path):
    ours = tiny()
    ours.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    assert again.config == ours.config
    assert not again.training
    theirs = dict(again.named_parameters())
    for name, p in ours.named_parameters():
        assert torch.equal(theirs.pop(name), p), name
    assert not theirs


def test_switches_can_be_turned_on_in_trained_weights(tmp_path, capsys):
    plain, idx = tiny(), tokens(1, 20)
    plain.save_pretrained(tmp_path)

    wide = GPT.from_pretrained(tmp_path, use_swa=True, window_size=20)
    assert torch.allclose(wide(idx)[0], plain(idx)[0], atol=1e-5)
    assert not capsys.readouterr().err

    rotary = GPT.from_pretrained(tmp_path, use_rope=True)
    assert "wpe.weight" not in rotary.state_dict()
    assert torch.equal(rotary.wte.weight, plain.wte.weight)
    assert "learned positions" in capsys.readouterr().err
