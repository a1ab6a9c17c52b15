"""
The specification of model.py and weights.py. Authorities: transformers' GPT-2, StarCoder2 and logits processors, and the
safetensors library.
"""

import dataclasses
import itertools
import json
import math
import struct

import pytest
import safetensors.torch
import torch
import transformers
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bench
import weights
from model import GPT, GPTConfig, InputError, attend, attend_in_blocks, rotate, sample, visible
from weights import read_safetensors

TINY = dict(block_size=32, vocab_size=101, n_layer=3, n_head=4, n_embd=32)
W = 5
SWITCHES = dict(rope=dict(use_rope=True), gqa=dict(use_gqa=True, n_kv_head=2), swa=dict(use_swa=True, window_size=W))
VARIANTS = {"+".join(names) or "gpt2": {k: v for name in names for k, v in SWITCHES[name].items()}
            for n in range(4) for names in itertools.combinations(SWITCHES, n)}
every_variant = pytest.mark.parametrize("switches", VARIANTS.values(), ids=VARIANTS)
transformers.logging.set_verbosity_error()


def tiny(**changes):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**TINY, **changes}))
    with torch.no_grad():   # biases start at zero: give every tensor something to get wrong
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def hf_gpt2(**changes):
    """transformers' own model, with random weights of a size at which an error shows."""
    torch.manual_seed(1)
    config = transformers.GPT2Config(vocab_size=101, n_positions=32, n_embd=32, n_layer=3, n_head=4, **changes)
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def tokens(B, T, V=101, seed=2):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def difference(ours, theirs, idx):
    with torch.no_grad():
        return (ours(idx)[0] - theirs(idx).logits).abs().max().item()


# ----------------------------------------------------------------------------------------------------------------------
# Equal to GPT-2

def test_GPTConfig_is_GPT2_124M_and_equal_to_transformers(tmp_path):
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    with torch.no_grad():   # released weights are larger than fresh ones: so are these
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    assert ours.config == GPTConfig()
    idx = tokens(2, 200, 50257)
    assert difference(ours, theirs, idx) <= 1e-4
    prompt = idx[:1, :8]
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, min_new_tokens=64, do_sample=False)
    assert torch.equal(ours.generate(prompt, 64, temperature=0), expected)


@pytest.mark.parametrize("name, layers, heads, width, millions", [
    ("gpt2", 12, 12, 768, 124_439_808), ("gpt2-medium", 24, 16, 1024, 354_823_168),
    ("gpt2-large", 36, 20, 1280, 774_030_080), ("gpt2-xl", 48, 25, 1600, 1_557_611_200)])
def test_number_of_parameters_of_the_four_released_sizes(name, layers, heads, width, millions):
    with torch.device("meta"):
        assert GPT(GPTConfig(n_layer=layers, n_head=heads, n_embd=width)).num_params() == millions
    assert name in weights.GPT2_SIZES


def test_loss_equals_transformers():
    theirs, idx = hf_gpt2(), tokens(3, 20)
    ours = tiny()
    weights.copy(ours, from_hf(theirs), "")
    _, loss = ours(idx[:, :-1], idx[:, 1:])
    assert loss.item() == pytest.approx(theirs(idx, labels=idx).loss.item(), rel=1e-5)


def test_gradients_equal_transformers():
    theirs, idx = hf_gpt2(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0), tokens(3, 20)
    ours = tiny()
    weights.copy(ours, from_hf(theirs), "")
    ours(idx[:, :-1], idx[:, 1:])[1].backward()
    theirs(idx, labels=idx).loss.backward()
    assert torch.allclose(ours.wte.weight.grad, theirs.transformer.wte.weight.grad, atol=1e-6)
    assert torch.allclose(ours.wpe.weight.grad, theirs.transformer.wpe.weight.grad, atol=1e-6)
    assert torch.allclose(ours.h[0].attn.c_attn.weight.grad.t(), theirs.transformer.h[0].attn.c_attn.weight.grad, atol=1e-6)


def from_hf(theirs):
    tensors = {k.removeprefix("transformer."): v for k, v in theirs.state_dict().items() if k != "lm_head.weight"}
    return {k: v.t() if k.endswith(weights.CONV1D) else v for k, v in tensors.items()}


# ----------------------------------------------------------------------------------------------------------------------
# The forward pass

@every_variant
def test_future_never_leaks_into_the_past(switches):
    model, idx = tiny(**switches), tokens(2, 32)
    changed = idx.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 101
    before, after = model(idx)[0], model(changed)[0]
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20], after[:, 20])


def test_target_of_minus_one_does_not_count():
    model, idx, targets = tiny(), tokens(1, 8), tokens(1, 8, seed=3)
    targets[0, :5] = -1
    logits, loss = model(idx, targets)
    assert loss.item() == pytest.approx(F.cross_entropy(logits[0, 5:], targets[0, 5:]).item())


def test_more_tokens_than_positions_is_an_error_before_any_kernel():
    with pytest.raises(ValueError, match="33 tokens.*block_size=32"):
        tiny()(tokens(1, 33))


def test_embedding_and_head_are_one_tensor():
    model = tiny()
    assert model.lm_head.weight is model.wte.weight
    assert len(list(model.parameters())) == 2 + 3 * 12 + 2


def test_initial_loss_is_that_of_a_uniform_guess():
    torch.manual_seed(0)
    _, loss = GPT(GPTConfig(**TINY))(tokens(8, 32), tokens(8, 32, seed=3))
    assert loss.item() == pytest.approx(math.log(101), abs=0.1)


def test_initialisation_scales_residual_projections_by_depth():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=8, n_embd=128, n_head=4, vocab_size=1000))
    for name, p in model.named_parameters():
        expected = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
        if p.dim() == 2:
            assert p.std().item() == pytest.approx(expected, rel=0.05), name
        else:
            assert torch.equal(p, torch.ones_like(p) if ".ln_" in f".{name}" and name.endswith("weight") else torch.zeros_like(p)), name


def test_dropout_acts_in_training_only():
    model, idx = tiny(dropout=0.5), tokens(1, 8)
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


def test_without_bias_there_is_none():
    assert not [name for name, _ in tiny(bias=False).named_parameters() if name.endswith("bias")]


@every_variant
@pytest.mark.parametrize("T", [4, 23, 32])
def test_flops_per_token_is_what_torch_counts(T, switches):
    model = tiny(**switches)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):   # the counter cannot see into fused kernels
        model(tokens(2, T), tokens(2, T))[1].backward()
    assert counter.get_total_flops() / (2 * T) == pytest.approx(model.flops_per_token(T), rel=1e-9)


@pytest.mark.parametrize("wrong, message", [
    (dict(n_embd=100, n_head=3), "n_embd=100.*n_head=3"), (dict(n_layer=0), "n_layer=0"), (dict(vocab_size=-1), "vocab_size=-1"),
    (dict(block_size=0), "block_size=0"), (dict(dropout=1.0), "dropout=1.0"), (dict(dropout=-0.1), "dropout=-0.1"),
    (dict(use_rope=True, n_embd=36), "n_embd=36, n_head=12: a head of 3 channels is odd"),
    (dict(rope_theta=500.0), "rope_theta=500.0.*use_rope=True"), (dict(use_rope=True, rope_theta=0.0), "rope_theta=0.0: must be positive"),
    (dict(n_kv_head=4), "use_gqa=False with n_kv_head=4"), (dict(use_gqa=True), "use_gqa=True with n_kv_head=None"),
    (dict(use_gqa=True, n_kv_head=5), "n_head=12 is not divisible by n_kv_head=5"),
    (dict(use_gqa=True, n_kv_head=0), "n_kv_head=0"), (dict(use_gqa=True, n_kv_head=24), "n_kv_head=24"),
    (dict(window_size=8), "use_swa=False with window_size=8"), (dict(use_swa=True), "use_swa=True with window_size=None"),
    (dict(use_swa=True, window_size=-1), "window_size=-1"), (dict(use_swa=True, window_size=(8,) * 11), "window_size=.*n_layer=12"),
    (dict(use_swa=True, window_size=(8,) * 11 + (-8,)), "window_size="), (dict(use_swa=True, window_size=2.5), "window_size=2.5")])
def test_contradictory_config_is_an_error_that_names_the_fields(wrong, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**wrong)


# ----------------------------------------------------------------------------------------------------------------------
# Generation

def test_greedy_takes_the_likeliest_token():
    model, idx = tiny(), tokens(2, 5)
    out = model.generate(idx, 10, temperature=0)
    assert out.shape == (2, 15) and torch.equal(out[:, :5], idx)
    for t in range(5, 15):
        assert torch.equal(out[:, t], model(out[:, :t])[0][:, -1].argmax(-1))


def test_past_block_size_it_sees_the_last_block_size_tokens():
    model, idx = tiny(), tokens(1, 30)
    out = model.generate(idx, 20, temperature=0)
    for t in range(33, 50):
        assert torch.equal(out[:, t], model(out[:, t - 32:t])[0][:, -1].argmax(-1))


def test_prompt_longer_than_block_size_is_cut_on_the_left():
    model, idx = tiny(), tokens(1, 50)
    assert torch.equal(model.generate(idx, 5, temperature=0)[:, 50:], model.generate(idx[:, -32:], 5, temperature=0)[:, 32:])


def test_lowest_temperature_is_greedy():
    model, idx = tiny(), tokens(2, 6)
    assert torch.equal(model.generate(idx, 10, temperature=1e-40), model.generate(idx, 10, temperature=0))


def test_rows_of_a_batch_are_independent():
    model, idx = tiny(), tokens(3, 6)
    out = model.generate(idx, 12, temperature=0)
    for row in range(3):
        assert torch.equal(out[row:row + 1], model.generate(idx[row:row + 1], 12, temperature=0))


def test_row_that_reaches_the_stop_token_stays_stopped():
    model = tiny()

    def draw(idx, **arguments):
        torch.manual_seed(5)
        return model.generate(idx, 12, temperature=3.0, **arguments)
    for rows in (2, 1):
        idx = tokens(2, 6)[:rows]
        free = draw(idx)
        stop = free[0, 9].item()
        first = free[0, 6:].tolist().index(stop) + 6
        assert (free[0, first:] != stop).any() and not (free[1:] == stop).any()   # it would go on, and the other row does
        out = draw(idx, stop_token=stop)
        assert torch.equal(out[0, :first + 1], free[0, :first + 1]) and (out[0, first:] == stop).all()
        assert out.shape[1] == (18 if rows == 2 else first + 1)   # once every row has stopped, so does generation


def test_stream_yields_what_generate_returns():
    model, idx = tiny(), tokens(2, 6)
    torch.manual_seed(5)
    out = model.generate(idx, 9)
    torch.manual_seed(5)
    assert torch.equal(torch.cat(list(model.stream(idx, 9)), dim=1), out[:, 6:])


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (1.0, None, None), (0.7, None, None), (1.0, 5, None), (1.0, None, 0.6), (1.3, 20, 0.8), (1.0, 1000, 1.0), (1.0, None, 1e-6)])
def test_sampling_follows_the_distribution_of_transformers(temperature, top_k, top_p):
    logits = 2 * torch.randn(1, 30, generator=torch.Generator().manual_seed(0))
    warpers = [transformers.TemperatureLogitsWarper(temperature)]
    warpers += [transformers.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [transformers.TopPLogitsWarper(top_p)] if top_p and top_p < 1 else []
    expected = logits
    for warper in warpers:
        expected = warper(None, expected)
    expected = expected.softmax(-1)[0]
    torch.manual_seed(0)
    drawn = sample(logits.expand(200_000, -1), temperature, top_k, top_p).flatten()
    measured = drawn.bincount(minlength=30) / len(drawn)
    assert (measured[expected == 0] == 0).all()
    assert torch.allclose(measured, expected, atol=0.005)


def test_top_p_of_1_excludes_nothing(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "multinomial", lambda p, num_samples: seen.append(p) or p.argmax(-1, keepdim=True))
    sample(3 * torch.randn(4, 50257, generator=torch.Generator().manual_seed(0)), 1.0, None, 1.0)
    assert (seen[0] > 0).all()   # a running sum in float32 passes 1 thousands of tokens too early


def test_padding_of_the_vocabulary_is_never_sampled():
    model = tiny()
    assert (model.generate(tokens(50, 4, V=10), 20, temperature=5.0, vocab_size=10) < 10).all()


@pytest.mark.parametrize("arguments, message", [
    (dict(temperature=-1), "temperature=-1"), (dict(temperature=math.nan), "temperature=nan"), (dict(top_k=0), "top_k=0"),
    (dict(top_p=0.0), "top_p=0.0"), (dict(top_p=1.1), "top_p=1.1")])
def test_sampling_arguments_out_of_range_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny().generate(tokens(1, 4), 1, **arguments)


def test_empty_prompt_is_an_error():
    with pytest.raises(ValueError, match="empty prompt"):
        tiny().generate(torch.zeros(1, 0, dtype=torch.long), 1)


# ----------------------------------------------------------------------------------------------------------------------
# Equal to StarCoder2, which is GPT-2 with the three switches on

def hf_starcoder2(size=TINY, K=2, window=None, **changes):
    torch.manual_seed(1)
    config = transformers.Starcoder2Config(**dict(
        vocab_size=size["vocab_size"], hidden_size=size["n_embd"], intermediate_size=4 * size["n_embd"], num_hidden_layers=size["n_layer"],
        num_attention_heads=size["n_head"], num_key_value_heads=K, max_position_embeddings=size["block_size"], sliding_window=window,
        rope_parameters=dict(rope_type="default", rope_theta=500.0)) | changes, attn_implementation="eager")   # the plainest of its forms
    model = transformers.Starcoder2ForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.1 if size is TINY else 0.02))
    return model.eval()


@pytest.mark.parametrize("K, window", [(12, None), (4, None), (4, 64), (1, 300), (4, 301)],
                         ids=["rope", "rope+gqa", "rope+gqa+swa, W < T", "W = T", "W > T"])
def test_twelve_layers_of_768_are_equal_to_starcoder2(tmp_path, K, window):
    size = dataclasses.asdict(GPTConfig(vocab_size=1000))
    theirs = hf_starcoder2(size, K, window)
    theirs.save_pretrained(tmp_path)
    ours, idx = GPT.from_pretrained(tmp_path), tokens(1, 300, 1000)
    assert ours.config == GPTConfig(vocab_size=1000, use_rope=True, rope_theta=500.0, use_gqa=True, n_kv_head=K,
                                    use_swa=window is not None, window_size=window)
    assert difference(ours, theirs, idx) <= 1e-4


@pytest.mark.parametrize("T", [1, W - 1, W, W + 1, 2 * W, 31, 32])
@pytest.mark.parametrize("K, window", [(4, None), (2, None), (1, W), (2, W), (4, 1), (2, 31)])
def test_equal_to_starcoder2_at_every_length(tmp_path, K, window, T):
    theirs = hf_starcoder2(K=K, window=window)
    theirs.save_pretrained(tmp_path)
    assert difference(GPT.from_pretrained(tmp_path), theirs, tokens(2, T)) < 1e-5


def test_greedy_text_equals_starcoder2_far_past_the_window(tmp_path):
    theirs, idx = hf_starcoder2(window=W), tokens(2, 7)
    theirs.save_pretrained(tmp_path)
    expected = theirs.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=60, min_new_tokens=60, do_sample=False)
    assert torch.equal(GPT.from_pretrained(tmp_path).generate(idx, 60, temperature=0), expected)


@pytest.mark.parametrize("changes", [dict(), dict(tie_word_embeddings=False), dict(use_bias=False), dict(sliding_window=W)])
@pytest.mark.parametrize("form", ["whole", "shards", "rope_theta at the top"])
def test_every_form_of_a_starcoder2_folder_loads(tmp_path, changes, form):
    theirs = hf_starcoder2(**changes)
    theirs.save_pretrained(tmp_path, **(dict(max_shard_size="20KB") if form == "shards" else {}))
    assert (tmp_path / "model.safetensors.index.json").exists() == (form == "shards")
    if form == "rope_theta at the top":
        config = json.loads((tmp_path / "config.json").read_text())
        config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
        (tmp_path / "config.json").write_text(json.dumps(config))
    ours = GPT.from_pretrained(tmp_path)
    assert ours.config.tied == changes.get("tie_word_embeddings", True)
    assert difference(ours, theirs, tokens(2, 32)) < 1e-5


@pytest.mark.parametrize("switches", [dict(use_rope=True), dict(use_rope=True, rope_theta=500.0, tied=False), dict(use_rope=True, bias=False),
                                      VARIANTS["rope+gqa"], VARIANTS["rope+swa"], VARIANTS["rope+gqa+swa"], dict(tied=False),
                                      VARIANTS["rope"] | dict(use_swa=True, window_size=0)])
def test_exported_variant_opens_in_transformers_with_equal_logits(tmp_path, switches):
    ours, idx = tiny(**switches), tokens(2, 32)
    ours.save_pretrained(tmp_path)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert difference(ours, theirs.eval(), idx) < 1e-5
    again = GPT.from_pretrained(tmp_path)
    for (name, a), b in zip(ours.named_parameters(), [dict(again.named_parameters())[n] for n, _ in ours.named_parameters()], strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("switches", [VARIANTS["gqa"], VARIANTS["swa"], VARIANTS["gqa+swa"],
                                      dict(use_rope=True, use_swa=True, window_size=(W, 0, W))])
def test_what_neither_gpt2_nor_starcoder2_is_cannot_be_exported(tmp_path, switches):
    with pytest.raises(ValueError, match="neither format we write holds it"):
        tiny(**switches).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key, value", [("rope_scaling", {"type": "yarn"}), ("rope_parameters", {"rope_type": "yarn"}), ("norm_epsilon", 1e-6),
                                        ("intermediate_size", 99), ("hidden_act", "silu"), ("num_key_value_heads", 3), ("num_key_value_heads", 2.0), ("hidden_size", None)])
def test_config_that_is_not_starcoder2_is_refused(tmp_path, key, value):
    hf_starcoder2().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ValueError, match="config.json"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("change", [
    lambda w: w | {"model.layers.0.self_attn.k_proj.weight": torch.ones(16, 31)}, lambda w: w | {"model.layers.0.self_attn.k_proj.weight": torch.ones(17, 32)},
    lambda w: w | {"model.layers.0.mlp.c_fc.weight": torch.tensor(1.0)}, lambda w: w | {"model.layers.0.self_attn.q_proj.bias": torch.tensor(1.0)},
    lambda w: {k: v for k, v in w.items() if "1.self_attn.k_proj" not in k}])
def test_misshapen_starcoder2_is_refused(tmp_path, change):
    hf_starcoder2(use_bias=True).save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    for changes in ({}, dict(n_kv_head=1)):
        with pytest.raises(ValueError, match="h.0|h.1|tensors are not those of a starcoder2"):
            GPT.from_pretrained(tmp_path, **changes)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": {"a": "../elsewhere.safetensors"}}', '{"weight_map": {"a": "missing.safetensors"}}',
                                   '{"weight_map": {"a": 3}}'])
def test_broken_index_of_shards_is_refused(tmp_path, index):
    hf_starcoder2().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match="index.json"):
        GPT.from_pretrained(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# RoPE

def test_rotation_is_a_product_of_complex_numbers():
    """RoFormer, equation 12: the pair (a, b) is the number a + ib, and is multiplied by exp(i * pos * theta^(-2d/D))."""
    x, pos = torch.randn(2, 3, 7, 8), torch.tensor([0, 1, 2, 50, 51, 1000, 30_000])
    number = torch.complex(x[..., :4].double(), x[..., 4:].double())
    angle = pos[:, None].double() * 10_000.0 ** (-2 * torch.arange(4).double() / 8)
    expected = number * torch.exp(1j * angle)
    assert torch.allclose(rotate(x, pos, 10_000.0), torch.cat((expected.real, expected.imag), -1).float(), atol=5e-3)   # 30,000 in float32
    assert torch.allclose(rotate(x, pos, 10_000.0)[:, :, :4], torch.cat((expected.real, expected.imag), -1).float()[:, :, :4], atol=2e-5)


def scores(q, k, query_pos, key_pos):
    """q, k: one vector each, put at all those positions -> their products"""
    q, k = q.expand(1, 1, len(query_pos), -1), k.expand(1, 1, len(key_pos), -1)
    return (rotate(q, query_pos, 100.0) @ rotate(k, key_pos, 100.0).transpose(-1, -2))[0, 0]


def test_rope_scores_depend_on_relative_position_only_and_on_every_step_of_it():
    q, k, pos = torch.randn(16), torch.randn(16), torch.arange(20)
    score = scores(q, k, pos, pos)
    for shift in (1, 7, 100):
        assert torch.allclose(scores(q, k, pos + shift, pos + shift), score, atol=1e-4)
        assert (scores(q, k, pos + shift, pos) - score).abs().max() > 0.1   # one of the two wrong by a step is another score
    for distance in range(-19, 20):
        assert score.diagonal(distance).std(unbiased=False) < 1e-5


def test_rotation_keeps_lengths_and_leaves_position_0_alone():
    x = torch.randn(1, 2, 30, 8)
    y = rotate(x, torch.arange(30), 10_000.0)
    assert torch.allclose(x.norm(dim=-1), y.norm(dim=-1), rtol=1e-5) and torch.equal(y[:, :, 0], x[:, :, 0])


def test_bfloat16_is_rotated_in_float32():
    x, pos = torch.randn(1, 1, 2, 8).bfloat16(), torch.tensor([4096, 4097])   # one number in bfloat16
    assert rotate(x, pos, 10_000.0).dtype == torch.bfloat16
    assert torch.equal(rotate(x, pos, 10_000.0), rotate(x.float(), pos, 10_000.0).bfloat16())


def test_rope_replaces_learned_positions_and_reads_past_block_size():
    model = tiny(use_rope=True)
    assert "wpe.weight" not in model.state_dict() and tiny().num_params() - model.num_params() == 32 * 32
    assert model(tokens(1, 100))[0].shape == (1, 100, 101)


# ----------------------------------------------------------------------------------------------------------------------
# Grouped queries

def repeated_heads(grouped):
    """The multi-head model in which every query head has a copy of the key/value head it shared."""
    c = grouped.config
    model = GPT(dataclasses.replace(c, use_gqa=False, n_kv_head=None)).eval()
    tensors = dict(grouped.state_dict())
    for name in [n for n in tensors if ".c_attn." in n]:
        q, k, v = tensors[name].unflatten(0, (-1, c.n_embd // c.n_head)).split((c.n_head, c.n_kv_head, c.n_kv_head))
        k, v = ([t[h * c.n_kv_head // c.n_head] for h in range(c.n_head)] for t in (k, v))
        tensors[name] = torch.cat((q, torch.stack(k), torch.stack(v))).flatten(0, 1)
    model.load_state_dict(tensors)
    return model


@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("others", [{}, SWITCHES["rope"], SWITCHES["swa"]])
def test_gqa_equals_multi_head_with_repeated_heads(K, others):
    grouped, idx = tiny(use_gqa=True, n_kv_head=K, **others), tokens(2, 32)
    assert torch.allclose(grouped(idx)[0], repeated_heads(grouped)(idx)[0], atol=1e-5)


def test_n_kv_head_equal_to_n_head_is_multi_head():
    grouped, plain, idx = tiny(use_gqa=True, n_kv_head=4), tiny(), tokens(2, 32)
    plain.load_state_dict(grouped.state_dict())
    assert torch.equal(grouped(idx)[0], plain(idx)[0])


@pytest.mark.parametrize("K", [1, 2])
def test_mean_of_identical_heads_changes_nothing(tmp_path, K):
    grouped, idx = tiny(use_gqa=True, n_kv_head=K), tokens(2, 32)
    repeated_heads(grouped).save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path, use_gqa=True, n_kv_head=K)
    assert again.config == grouped.config and torch.allclose(again(idx)[0], grouped(idx)[0], atol=1e-5)


def test_pooled_head_is_the_mean_of_those_it_replaces(tmp_path):
    plain = tiny()
    plain.save_pretrained(tmp_path)
    old, new = plain.h[1].attn.c_attn, GPT.from_pretrained(tmp_path, use_gqa=True, n_kv_head=2).h[1].attn.c_attn
    assert torch.equal(new.weight[:32], old.weight[:32])                                             # queries
    assert torch.allclose(new.weight[32 + 8:32 + 16], (old.weight[32 + 16:32 + 24] + old.weight[32 + 24:64]) / 2)   # keys of heads 2, 3
    assert torch.allclose(new.bias[48:56], (old.bias[64:72] + old.bias[72:80]) / 2)                  # values of heads 0, 1
    with pytest.raises(ValueError, match="n_kv_head=4: .* has 2 key/value heads"):
        tiny(use_rope=True, use_gqa=True, n_kv_head=2).save_pretrained(tmp_path)
        GPT.from_pretrained(tmp_path, n_kv_head=4)


def test_switches_on_a_trained_checkpoint(tmp_path, capsys):
    plain, idx = tiny(), tokens(1, 20)
    plain.save_pretrained(tmp_path)
    wide = GPT.from_pretrained(tmp_path, use_swa=True, window_size=20)
    assert torch.allclose(wide(idx)[0], plain(idx)[0], atol=1e-5) and not capsys.readouterr().err
    turned = GPT.from_pretrained(tmp_path, use_rope=True)
    assert "wpe.weight" not in turned.state_dict() and torch.equal(turned.wte.weight, plain.wte.weight)
    assert "drops the learned positions" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# Sliding windows

def test_visible_is_the_definition():
    for window in (0, 1, 3, 10, 100):
        seen = visible(torch.arange(4, 12), torch.arange(-1, 12), window)
        for i, j in itertools.product(range(4, 12), range(-1, 12)):
            assert seen[i - 4, j + 1] == (j >= 0 and 0 <= i - j < (window or 100)), (window, i, j)


@pytest.mark.parametrize("T", [9, 15, 16, 17, 24, 50])
@pytest.mark.parametrize("K", [1, 2, 4])
def test_blocks_equal_the_mask_forward_and_backward(T, K):
    window, grads = 8, []
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, T, 6, requires_grad=True) for heads in (4, K, K))
    weight = torch.randn(2, 4, T, 6)
    pos = torch.arange(T)
    for y in (attend_in_blocks(q, k, v, window), attend(q, k, v, visible(pos, pos, window))):
        grads.append((y, *torch.autograd.grad((y * weight).sum(), (q, k, v))))
    for blocked, masked in zip(*grads):
        assert torch.allclose(blocked, masked, atol=1e-5)


def test_blocks_under_dropout_have_the_mean_of_those_without():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 20, 4) for _ in range(3))
    drawn = torch.stack([attend_in_blocks(q, k, v, 6, dropout=0.3) for _ in range(4000)])
    assert drawn.std(0).min() > 0.01 and torch.allclose(drawn.mean(0), attend_in_blocks(q, k, v, 6), atol=0.1)


def test_all_switches_compile_without_a_break_and_give_the_same_gradients():
    model, idx = tiny(**VARIANTS["rope+gqa+swa"]).train(), tokens(2, 23)
    model(idx, idx)[1].backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch.compile(model, fullgraph=True)(idx, idx)[1].backward()
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, expected[name], atol=1e-5), name


@pytest.mark.parametrize("switches", [VARIANTS["swa"], VARIANTS["rope+gqa+swa"]])
def test_window_sees_exactly_W_keys(switches):
    model, idx, i = tiny(n_layer=1, **switches), tokens(1, 32), 20
    before = model(idx)[0][0, i]
    for j in range(32):
        changed = idx.clone()
        changed[0, j] = (changed[0, j] + 1) % 101
        assert torch.equal(model(changed)[0][0, i], before) == (not 0 <= i - j < W), j   # outside nothing changes, not a bit


def test_receptive_field_after_L_layers_is_L_times_W_minus_1_plus_1():
    model, idx, i = tiny(**SWITCHES["swa"]), tokens(1, 32), 30
    before = model(idx)[0][0, i]
    seen = 0
    for j in range(32):
        changed = idx.clone()
        changed[0, j] = (changed[0, j] + 1) % 101
        seen += not torch.equal(model(changed)[0][0, i], before)
    assert seen == 3 * (W - 1) + 1


@pytest.mark.parametrize("window", [32, 33, 1000, 0, (0, 0, 0), (40, 0, 32)])
def test_window_no_shorter_than_the_text_is_full_attention(window):
    windowed, full, idx = tiny(use_swa=True, window_size=window), tiny(), tokens(2, 32)
    assert torch.equal(windowed(idx)[0], full(idx)[0])


def test_one_window_a_layer():
    model = tiny(use_swa=True, window_size=[W, 0, 2])
    assert model.config.windows == (W, 0, 2) and [block.attn.window for block in model.h] == [W, 0, 2]
    assert tiny(use_swa=True, window_size=W).config.windows == (W,) * 3 and tiny().config.windows == (0,) * 3


# ----------------------------------------------------------------------------------------------------------------------
# The cache

def read_in_chunks(model, idx, size, cache):
    return torch.cat([model(idx[:, i:i + size], cache=cache)[0] for i in range(0, idx.shape[1], size)], dim=1)


@every_variant
@pytest.mark.parametrize("chunk", [1, 3, W - 1, W, W + 1, 32])
@torch.no_grad()
def test_cached_equals_uncached_in_chunks_past_several_wraps_and_after_reuse(switches, chunk):
    model, idx = tiny(**switches), tokens(3, 32)
    cache = model.new_cache(3)
    for text in (idx, tokens(3, 29, seed=7)):
        assert torch.allclose(read_in_chunks(model, text, chunk, cache), model(text)[0], atol=1e-5)
        assert cache.length == text.shape[1]
        cache.reset()


@torch.no_grad()
def test_cached_equals_uncached_in_chunks_of_every_size_in_turn():
    idx = tokens(2, 150)
    for switches in (VARIANTS["rope"], VARIANTS["rope+gqa+swa"], VARIANTS["rope"] | dict(use_swa=True, window_size=(W, 0, 2 * W))):
        model = tiny(**switches)
        cache, parts, i = model.new_cache(2), [], 0
        for size in (1, 7, 1, 1, 2, 20, 1, 5, 4, 6, 70, 1, 1, 30):
            parts.append(model(idx[:, i:i + size], cache=cache)[0])
            i += size
        assert i == 150 and torch.allclose(torch.cat(parts, 1), model(idx)[0], atol=1e-5)


@torch.no_grad()
def test_cache_holds_K_heads_and_W_slots_and_no_more():
    def size(model, T):
        cache = model.new_cache(2)
        read_in_chunks(model, tokens(2, T), 4, cache)
        return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.k, layer.v))
    full = size(tiny(use_rope=True), 64)
    assert full == 2 * 3 * 2 * 64 * 32 * 4   # k and v, layers, batch, tokens, channels, bytes
    assert size(tiny(**VARIANTS["rope+gqa"]), 64) == full // 2
    assert size(tiny(**VARIANTS["rope+swa"]), 64) == size(tiny(**VARIANTS["rope+swa"]), 1000) == full * W // 64


@every_variant
def test_greedy_generation_is_that_without_a_cache(switches):
    model, idx = tiny(**switches), tokens(2, 6)
    out = model.generate(idx, 60, temperature=0)
    endless = model.config.use_rope and model.config.use_swa
    for t in (6, 7, 20, 31, 32, 33, 40, 65):
        assert torch.equal(out[:, t], model(out[:, 0 if endless else max(0, t - 32):t])[0][:, -1].argmax(-1)), t


def test_cache_keeps_no_history_of_gradients():
    model = tiny()
    cache = model.new_cache(1)
    for _ in range(3):
        model(tokens(1, 3), cache=cache)
    assert not any(t.requires_grad for layer in cache.layers for t in (layer.k, layer.v))


def test_cache_of_another_batch_size_or_model_is_refused():
    model, other = tiny(), tiny(n_layer=2)
    with pytest.raises(ValueError, match="another model or batch size .2, here 3."):
        model(tokens(3, 4), cache=model.new_cache(2))
    with pytest.raises(ValueError, match="another model"):
        model(tokens(3, 4), cache=other.new_cache(3))


def test_more_tokens_than_learned_positions_are_refused_with_a_cache_too():
    model = tiny()
    cache = model.new_cache(1)
    model(tokens(1, 30), cache=cache)
    with pytest.raises(ValueError, match="33 tokens.*block_size=32"):
        model(tokens(1, 3), cache=cache)


# ----------------------------------------------------------------------------------------------------------------------
# Loading and saving

def rewrite(folder, change):
    """Apply change to the dictionary of tensors in folder/model.safetensors."""
    tensors = change(safetensors.torch.load_file(folder / "model.safetensors"))
    safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return tensors


def without_prefix(weights):
    return {k.removeprefix("transformer."): v for k, v in weights.items()}


def with_mask_buffers(weights):
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32).tril().bool() for i in range(3)}
    return without_prefix(weights) | masks | {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(3)}


@pytest.mark.parametrize("change", [dict, without_prefix, with_mask_buffers, lambda w: {k: v.double() for k, v in w.items()}])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_every_form_of_a_GPT2_folder_loads(tmp_path, change, file):
    theirs, idx = hf_gpt2(), tokens(2, 32)
    theirs.save_pretrained(tmp_path)
    tensors = rewrite(tmp_path, change)
    if file == "pytorch_model.bin":
        torch.save(tensors | {"lm_head.weight": theirs.lm_head.weight.detach().clone()}, tmp_path / file)   # old files keep it twice
        (tmp_path / "model.safetensors").unlink()
    assert difference(GPT.from_pretrained(tmp_path), theirs, idx) < 1e-5


@pytest.mark.parametrize("bias", [True, False])
def test_saved_folder_opens_in_transformers_with_equal_logits(tmp_path, bias):
    ours, idx = tiny(bias=bias), tokens(2, 32)
    ours.save_pretrained(tmp_path / "new" / "folder")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "folder", output_loading_info=True)
    assert not any(report.values()), report   # nothing missing, nothing unexpected
    assert difference(ours, theirs.eval(), idx) < 1e-5
    assert theirs.config.eos_token_id is None   # of a vocabulary that is not GPT-2's the end is not known


def test_round_trip_is_exact(tmp_path):
    ours = tiny()
    ours.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    assert again.config == ours.config and not again.training
    for (name, a), (_, b) in zip(ours.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_saving_over_a_folder_replaces_it(tmp_path):
    tiny().save_pretrained(tmp_path)
    tiny(n_layer=1).save_pretrained(tmp_path)
    assert GPT.from_pretrained(tmp_path).config.n_layer == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("overrides, message", [
    (dict(n_head=2), "n_head=2: .* has 4"), (dict(n_layer=1), "n_layer=1: .* has 3"), (dict(bias=False), "bias=False: .* has True"),
    (dict(tied=True), "tied=True: .* has False"), (dict(vocab_size=40), "vocab_size=40: .* has 101"), (dict(n_legs=4), "n_legs: no field")])
def test_what_the_weights_decide_cannot_be_overridden(tmp_path, overrides, message):
    tiny(tied=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(tmp_path, **overrides)


def test_shorter_block_size_keeps_the_first_positions(tmp_path):
    ours, idx = tiny(), tokens(1, 16)
    ours.save_pretrained(tmp_path)
    shorter = GPT.from_pretrained(tmp_path, block_size=16, dropout=0.1)
    assert shorter.config == GPTConfig(**{**TINY, "block_size": 16, "dropout": 0.1})
    assert torch.allclose(shorter(idx)[0], ours(idx)[0], atol=1e-6)
    with pytest.raises(ValueError, match="block_size=64.*32 positions"):
        GPT.from_pretrained(tmp_path, block_size=64)


@pytest.mark.parametrize("change, message", [
    (lambda w: {k: v for k, v in w.items() if "h.1.mlp.c_fc" not in k}, r"lacks 2 tensor\(s\): h.1.mlp.c_fc.bias"),
    (lambda w: w | {"transformer.surprise": torch.ones(1)}, r"unknown 1 tensor\(s\): surprise"),
    (lambda w: w | {"transformer.ln_f.weight": torch.ones(31)}, r"ln_f.weight has shape \(31,\), the model \(32,\)"),
    (lambda w: w | {"transformer.wpe.weight": torch.ones(31, 32)}, r"wpe.weight has shape"),
    (lambda w: w | {"transformer.h.0.attn.c_attn.weight": torch.ones(96, 32)}, r"c_attn.weight has shape"),
    (lambda w: w | {"lm_head.weight": torch.ones(101, 32)}, "lm_head.weight differs"),
    (lambda w: {k: v for k, v in w.items() if "wpe" not in k}, r"lacks 1 tensor\(s\): wpe.weight"),
    (lambda w: {"lm_head.weight": torch.ones(101, 32)}, r"lacks 40 tensor\(s\): h.0.attn.c_attn.bias, .* …")])
def test_missing_extra_or_misshapen_tensors_are_named(tmp_path, change, message):
    hf_gpt2().save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("key, value", [
    ("model_type", "llama"), ("activation_function", "relu"), ("layer_norm_epsilon", 1e-6), ("n_inner", 7),
    ("scale_attn_by_inverse_layer_idx", True), ("scale_attn_weights", False), ("n_head", 5), ("n_embd", "wide"), ("n_layer", None)])
def test_config_that_is_not_GPT2_is_refused(tmp_path, key, value):
    hf_gpt2().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ValueError, match=key):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"model_type": "gpt2"}'])
def test_broken_config_json_is_refused(tmp_path, text):
    hf_gpt2().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json"):
        GPT.from_pretrained(tmp_path)


def test_unknown_name_and_empty_folder_are_refused(tmp_path):
    for name in ("gpt3", tmp_path):
        with pytest.raises(ValueError, match="not one of gpt2, gpt2-medium"):
            GPT.from_pretrained(name)
    hf_gpt2().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="neither model.safetensors"):
        GPT.from_pretrained(tmp_path)


class RunsCode:
    def __reduce__(self):
        return print, ("code of a stranger",)


def test_pickle_that_would_run_code_is_refused(tmp_path, capsys):
    hf_gpt2().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"wte.weight": RunsCode()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="could run code"):
        GPT.from_pretrained(tmp_path)
    assert "stranger" not in capsys.readouterr().out


def test_pickle_cut_short_is_refused(tmp_path):
    hf_gpt2().save_pretrained(tmp_path)
    torch.save(safetensors.torch.load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    raw = (tmp_path / "pytorch_model.bin").read_bytes()
    for length in (0, 1, 100, len(raw) // 2, len(raw) - 1):
        (tmp_path / "pytorch_model.bin").write_bytes(raw[:length])
        with pytest.raises(ValueError, match="pytorch_model.bin"):
            GPT.from_pretrained(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# The safetensors format

def test_reads_every_dtype_that_the_library_writes(tmp_path):
    tensors = {name: (torch.randn(3, 5) * 9).to(dtype) for name, dtype in weights.DTYPES.items()}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4)}
    safetensors.torch.save_file(tensors, tmp_path / "t.safetensors", {"note": "to be ignored"})
    ours = read_safetensors(tmp_path / "t.safetensors")
    assert ours.keys() == tensors.keys()
    for name, t in tensors.items():
        assert ours[name].dtype == t.dtype and torch.equal(ours[name], t), name


def test_library_reads_what_we_write(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(4, 2).t(), "scalar": torch.tensor(2.5), "half": torch.randn(7).bfloat16()}
    weights.write_safetensors(tmp_path / "t.safetensors", tensors)
    theirs = safetensors.torch.load_file(tmp_path / "t.safetensors")
    for name, t in tensors.items():
        assert torch.equal(theirs[name], t.float()), name


def forged(header, data=b"\0" * 16, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


F32 = dict(dtype="F32", shape=[2], data_offsets=[0, 8])
LAST = dict(dtype="F32", shape=[2], data_offsets=[8, 16])


@pytest.mark.parametrize("raw", [
    pytest.param(b"", id="empty"),
    pytest.param(b"1234567", id="shorter than its length"),
    pytest.param(forged({"a": F32, "b": LAST}, length=2**63), id="huge header length"),
    pytest.param(forged({"a": F32, "b": LAST}, length=10_000), id="header past the end"),
    pytest.param(forged({"a": F32, "b": LAST}, length=5), id="header length too small"),
    pytest.param(forged(b"not json"), id="header no JSON"),
    pytest.param(forged(b"\xff\xfe{}"), id="header no UTF-8"),
    pytest.param(forged(b"[" * 50_000), id="header nested deep"),
    pytest.param(forged([1, 2]), id="header a list"),
    pytest.param(forged({"a": 1}), id="entry a number"),
    pytest.param(forged({"a": F32}), id="bytes that belong to no tensor"),
    pytest.param(forged({"a": F32, "b": LAST}, data=b"\0" * 15), id="cut short by one byte"),
    pytest.param(forged({"a": F32, "b": LAST}, data=b"\0" * 17), id="one byte too many"),
    pytest.param(forged({"a": F32, "b": F32}), id="overlapping"),
    pytest.param(forged({"a": F32, "b": LAST | {"data_offsets": [4, 12]}}), id="overlapping by half"),
    pytest.param(forged({"a": F32, "b": LAST | {"data_offsets": [16, 24]}}, data=b"\0" * 24), id="a gap"),
    pytest.param(forged({"a": F32, "b": LAST | {"data_offsets": [8, 1 << 40], "shape": [1 << 38]}}), id="out of range"),
    pytest.param(forged({"a": F32 | {"data_offsets": [-8, 0]}, "b": LAST}), id="negative offset"),
    pytest.param(forged({"a": F32 | {"data_offsets": [8, 0]}, "b": LAST}), id="backwards"),
    pytest.param(forged({"a": F32 | {"shape": [3]}, "b": LAST}), id="shape does not fit"),
    pytest.param(forged({"a": F32 | {"shape": [-1, -2]}, "b": LAST}), id="negative shape"),
    pytest.param(forged({"a": F32 | {"shape": [2.0]}, "b": LAST}), id="shape of floats"),
    pytest.param(forged({"a": F32 | {"shape": 2}, "b": LAST}), id="shape no list"),
    pytest.param(forged({"a": F32 | {"dtype": "F64"}, "b": LAST}), id="lying dtype"),
    pytest.param(forged({"a": F32 | {"dtype": "F33"}, "b": LAST}), id="unknown dtype"),
    pytest.param(forged({"a": F32 | {"dtype": ["F32"]}, "b": LAST}), id="dtype a list"),
    pytest.param(forged({"a": F32 | {"data_offsets": [0]}, "b": LAST}), id="one offset"),
    pytest.param(forged({"a": F32 | {"data_offsets": "ab"}, "b": LAST}), id="offsets a string"),
    pytest.param(forged({"a": {"dtype": "F32"}, "b": LAST}), id="keys missing")])
def test_forged_safetensors_file_is_refused(tmp_path, raw):
    (tmp_path / "t.safetensors").write_bytes(raw)
    with pytest.raises(InputError, match="t.safetensors cannot be read as safetensors"):
        read_safetensors(tmp_path / "t.safetensors")


def test_the_forgeries_are_forged_from_a_good_file(tmp_path):
    (tmp_path / "t.safetensors").write_bytes(forged({"a": F32, "b": LAST}))
    assert read_safetensors(tmp_path / "t.safetensors").keys() == {"a", "b"}


def test_file_replaced_only_when_whole(tmp_path):
    (tmp_path / "f").write_bytes(b"before")
    with pytest.raises(RuntimeError), weights.replacing(tmp_path / "f") as f:
        f.write(b"half of")
        raise RuntimeError
    assert (tmp_path / "f").read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 1


@every_variant
def test_cache_takes_the_bytes_that_the_benchmark_states(switches):
    model = tiny(**switches)
    for n in (1, 4, 23, 32):
        bench.fill(model, n, B=2)   # raises where what the cache holds is not bench.cache_bytes
    assert bench.cache_bytes(GPTConfig(), 1024) == 2 * 12 * 1024 * 768 * 4
