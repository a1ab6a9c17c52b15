"""
The specification of model.py. Authorities: transformers' GPT-2, its logits processors, and the safetensors library.
"""

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

import model as plain
from model import GPT, GPTConfig, InputError, read_safetensors

TINY = dict(block_size=32, vocab_size=101, n_layer=3, n_head=4, n_embd=32)
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
    assert name in plain.GPT2_SIZES


def test_loss_equals_transformers():
    theirs, idx = hf_gpt2(), tokens(3, 20)
    ours = tiny()
    plain.copy_weights(ours, from_hf(theirs), "")
    _, loss = ours(idx[:, :-1], idx[:, 1:])
    assert loss.item() == pytest.approx(theirs(idx, labels=idx).loss.item(), rel=1e-5)


def test_gradients_equal_transformers():
    theirs, idx = hf_gpt2(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0), tokens(3, 20)
    ours = tiny()
    plain.copy_weights(ours, from_hf(theirs), "")
    ours(idx[:, :-1], idx[:, 1:])[1].backward()
    theirs(idx, labels=idx).loss.backward()
    assert torch.allclose(ours.wte.weight.grad, theirs.transformer.wte.weight.grad, atol=1e-6)
    assert torch.allclose(ours.wpe.weight.grad, theirs.transformer.wpe.weight.grad, atol=1e-6)
    assert torch.allclose(ours.h[0].attn.c_attn.weight.grad.t(), theirs.transformer.h[0].attn.c_attn.weight.grad, atol=1e-6)


def from_hf(theirs):
    weights = {k.removeprefix("transformer."): v for k, v in theirs.state_dict().items() if k != "lm_head.weight"}
    return {k: v.t() if k.endswith(plain.CONV1D) else v for k, v in weights.items()}


# ----------------------------------------------------------------------------------------------------------------------
# The forward pass

def test_future_never_leaks_into_the_past():
    model, idx = tiny(), tokens(2, 32)
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


@pytest.mark.parametrize("T", [16, 32])
def test_flops_per_token_is_what_torch_counts(T):
    model = tiny()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):   # the counter cannot see into fused kernels
        model(tokens(2, T), tokens(2, T))[1].backward()
    assert counter.get_total_flops() / (2 * T) == model.flops_per_token(T)


@pytest.mark.parametrize("wrong, message", [
    (dict(n_embd=100, n_head=3), "n_embd=100.*n_head=3"), (dict(n_layer=0), "n_layer=0"), (dict(vocab_size=-1), "vocab_size=-1"),
    (dict(block_size=0), "block_size=0"), (dict(dropout=1.0), "dropout=1.0"), (dict(dropout=-0.1), "dropout=-0.1")])
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


def test_rows_of_a_batch_are_independent():
    model, idx = tiny(), tokens(3, 6)
    out = model.generate(idx, 12, temperature=0)
    for row in range(3):
        assert torch.equal(out[row:row + 1], model.generate(idx[row:row + 1], 12, temperature=0))


def test_row_that_reaches_the_stop_token_stays_stopped():
    model, idx = tiny(), tokens(2, 6)
    free = model.generate(idx, 12, temperature=0)
    stop = free[0, 9].item()
    out = model.generate(idx, 12, temperature=0, stop_token=stop)
    first = free[0, 6:].tolist().index(stop) + 6
    assert torch.equal(out[0, :first + 1], free[0, :first + 1]) and (out[0, first:] == stop).all()
    alone = model.generate(idx[:1], 12, temperature=0, stop_token=stop)
    assert torch.equal(alone, free[:1, :first + 1])   # once every row has stopped, so does generation


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
    drawn = plain.sample(logits.expand(200_000, -1), temperature, top_k, top_p).flatten()
    measured = drawn.bincount(minlength=30) / len(drawn)
    assert (measured[expected == 0] == 0).all()
    assert torch.allclose(measured, expected, atol=0.005)


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
# Loading and saving

def rewrite(folder, change):
    """Apply change to the dictionary of tensors in folder/model.safetensors."""
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights = change(weights)
    safetensors.torch.save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return weights


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
    weights = rewrite(tmp_path, change)
    if file == "pytorch_model.bin":
        torch.save(weights | {"lm_head.weight": theirs.lm_head.weight.detach().clone()}, tmp_path / file)   # old files keep it twice
        (tmp_path / "model.safetensors").unlink()
    assert difference(GPT.from_pretrained(tmp_path), theirs, idx) < 1e-5


@pytest.mark.parametrize("bias", [True, False])
def test_saved_folder_opens_in_transformers_with_equal_logits(tmp_path, bias):
    ours, idx = tiny(bias=bias), tokens(2, 32)
    ours.save_pretrained(tmp_path / "new" / "folder")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "folder", output_loading_info=True)
    assert not any(report.values()), report   # nothing missing, nothing unexpected
    assert difference(ours, theirs.eval(), idx) < 1e-5


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
    with pytest.raises(ValueError, match="neither model.safetensors nor"):
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
    tensors = {name: (torch.randn(3, 5) * 9).to(dtype) for name, dtype in plain.DTYPES.items()}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4)}
    safetensors.torch.save_file(tensors, tmp_path / "t.safetensors", {"note": "to be ignored"})
    ours = read_safetensors(tmp_path / "t.safetensors")
    assert ours.keys() == tensors.keys()
    for name, t in tensors.items():
        assert ours[name].dtype == t.dtype and torch.equal(ours[name], t), name


def test_library_reads_what_we_write(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(4, 2).t(), "scalar": torch.tensor(2.5), "half": torch.randn(7).bfloat16()}
    plain.write_safetensors(tmp_path / "t.safetensors", tensors)
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
    pytest.param(forged({"a": F32 | {"data_offsets": [0]}, "b": LAST}), id="one offset"),
    pytest.param(forged({"a": F32 | {"data_offsets": "ab"}, "b": LAST}), id="offsets a string"),
    pytest.param(forged({"a": {"dtype": "F32"}, "b": LAST}), id="keys missing")])
def test_forged_safetensors_file_is_refused(tmp_path, raw):
    (tmp_path / "t.safetensors").write_bytes(raw)
    with pytest.raises(InputError, match="t.safetensors is cut short or not a safetensors file"):
        read_safetensors(tmp_path / "t.safetensors")


def test_the_forgeries_are_forged_from_a_good_file(tmp_path):
    (tmp_path / "t.safetensors").write_bytes(forged({"a": F32, "b": LAST}))
    assert read_safetensors(tmp_path / "t.safetensors").keys() == {"a", "b"}


def test_file_replaced_only_when_whole(tmp_path):
    (tmp_path / "f").write_bytes(b"before")
    with pytest.raises(RuntimeError), plain.replacing(tmp_path / "f") as f:
        f.write(b"half of")
        raise RuntimeError
    assert (tmp_path / "f").read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 1
