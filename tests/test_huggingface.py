"""
Hugging Face folders, read and written. The authority is transformers: what it saves we load, and
what we save it loads, with equal logits. A folder that is not what it says is refused by name.
"""

import json

import pytest
import safetensors.torch
import torch
import transformers

from model import GPT, GPTConfig
from plumbing.errors import InputError
from test_model import (
    GQA,
    MIXED_WINDOWS,
    ROPE,
    SWA,
    TINY,
    V,
    W,
    difference,
    greedy_text_of_transformers,
    hf_gpt2,
    hf_starcoder2,
    repeated_heads,
    shake,
    tiny,
    tokens,
)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "weights"


def write_text(path, text):
    path.write_text(text, encoding="utf-8")


def change_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    write_text(path, json.dumps(config | changes))


def change_tensors(folder, change):
    """Replace the tensors of a folder, {name: tensor}, by change(tensors), which is returned."""
    path = folder / "model.safetensors"
    tensors = change(safetensors.torch.load_file(path))
    contiguous = {name: t.contiguous() for name, t in tensors.items()}
    safetensors.torch.save_file(contiguous, path, {"format": "pt"})
    return tensors


def without(part):
    """A change for change_tensors: drop the tensors with part in their names."""
    return lambda tensors: {name: t for name, t in tensors.items() if part not in name}


def replacing(name, tensor):
    """A change for change_tensors: add or replace one tensor."""
    return lambda tensors: tensors | {name: tensor}


def pickle_tensors(folder):
    """Turn model.safetensors into the older pytorch_model.bin."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def same_parameters(a, b):
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------------------
# GPT-2 folders

def as_transformers_saves_them(tensors):
    return tensors


def as_OpenAI_released_them(tensors):
    return {name.removeprefix("transformer."): t for name, t in tensors.items()}


def with_the_masks_of_old_files(tensors):
    masks = {}
    for i in range(3):
        masks[f"h.{i}.attn.bias"] = torch.ones(1, 1, 32, 32).tril().bool()
        masks[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    return as_OpenAI_released_them(tensors) | masks


def in_float64(tensors):
    return {name: t.double() for name, t in tensors.items()}


def with_the_tied_head_too(tensors):
    return tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()}


@pytest.mark.parametrize("form", [
    as_transformers_saves_them,
    as_OpenAI_released_them,
    with_the_masks_of_old_files,
    in_float64,
    with_the_tied_head_too,
])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_every_form_of_a_GPT2_folder_loads(folder, form, file):
    theirs = hf_gpt2()
    theirs.save_pretrained(folder)
    change_tensors(folder, form)
    if file == "pytorch_model.bin":
        pickle_tensors(folder)
    assert difference(GPT.from_pretrained(folder), theirs, tokens(2, 32)) < 1e-5


def test_config_json_as_OpenAI_released_it_loads(folder):
    theirs = hf_gpt2()
    theirs.save_pretrained(folder)
    released = {
        "activation_function": "gelu_new",
        "attn_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": 32,
        "n_embd": 32,
        "n_head": 4,
        "n_layer": 3,
        "n_positions": 32,
        "resid_pdrop": 0.1,
        "vocab_size": V,
    }
    write_text(folder / "config.json", json.dumps(released))
    ours = GPT.from_pretrained(folder)
    assert ours.config == GPTConfig(**TINY)   # dropout is a setting of their training
    assert difference(ours, theirs, tokens(2, 32)) < 1e-5


# ------------------------------------------------------------------------------------------------
# StarCoder2 folders

@pytest.mark.parametrize("changes", [
    {},
    {"tie_word_embeddings": False},
    {"use_bias": False},
    {"sliding_window": W},
], ids=["tied", "untied", "without biases", "window"])
@pytest.mark.parametrize("form", ["whole", "in shards", "rope_theta at the top"])
def test_every_form_of_a_StarCoder2_folder_loads(folder, changes, form):
    theirs = hf_starcoder2(**changes)
    if form == "in shards":
        theirs.save_pretrained(folder, max_shard_size="20KB")
        assert (folder / "model.safetensors.index.json").exists()
    else:
        theirs.save_pretrained(folder)
    if form == "rope_theta at the top":
        change_config(folder, rope_theta=500.0, rope_parameters=None)
    ours = GPT.from_pretrained(folder)
    assert ours.config.tied == changes.get("tie_word_embeddings", True)
    assert difference(ours, theirs, tokens(2, 32)) < 1e-5


# ------------------------------------------------------------------------------------------------
# gpt_bigcode and gpt_neo folders: GPT-2 with one key/value head, and with windows

SHAPES = {
    "wide": {"n_layer": 2, "n_head": 4, "n_embd": 64},
    "deep": {"n_layer": 4, "n_head": 2, "n_embd": 32},
    "odd": {"n_layer": 3, "n_head": 3, "n_embd": 48},
}   # of heads of 16 channels: sqrt(16) = 4, so that the queries of a gpt_neo scale exactly
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
GREEDY = 40   # tokens, past every window


def hf_bigcode(shape, **changes):
    torch.manual_seed(2)
    config = transformers.GPTBigCodeConfig(
        n_positions=64, vocab_size=V, bos_token_id=None, eos_token_id=None, **shape, **changes)
    return shake(transformers.GPTBigCodeForCausalLM(config))


def hf_neo(shape, attention_types=None, **changes):
    torch.manual_seed(3)
    n_layer = shape["n_layer"]
    config = transformers.GPTNeoConfig(
        num_layers=n_layer, num_heads=shape["n_head"], hidden_size=shape["n_embd"],
        attention_types=attention_types or [[["global", "local"], n_layer // 2],
                                            [["local"], n_layer % 2]],
        max_position_embeddings=64, vocab_size=V, window_size=W, bos_token_id=None,
        eos_token_id=None, **changes)
    return shake(transformers.GPTNeoForCausalLM(config))


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}], ids=["tied", "untied"])
@pytest.mark.parametrize("make", [hf_bigcode, hf_neo])
@each_shape
def test_logits_and_text_are_those_of_transformers_and_the_way_back_is_exact(
        folder, make, shape, changes):
    theirs = make(shape, **changes)
    theirs.save_pretrained(folder)
    ours, idx = GPT.from_pretrained(folder), tokens(2, 64)
    assert difference(ours, theirs, idx) < 1e-4
    text = ours.generate(idx[:, :8], GREEDY, temperature=0)
    assert torch.equal(text, greedy_text_of_transformers(theirs, idx[:, :8], GREEDY))

    ours.save_pretrained("exported")
    again = opened_by_transformers("exported")
    assert type(again) is type(theirs)
    assert same_parameters(again, theirs)
    assert same_parameters(GPT.from_pretrained("exported"), ours)
    assert GPT.from_pretrained("exported").config == ours.config


def test_queries_of_a_gpt_neo_of_any_width_come_back_up_to_rounding(folder):
    theirs = hf_neo({"n_layer": 1, "n_head": 2, "n_embd": 24})   # sqrt(12)
    theirs.save_pretrained(folder)
    ours = GPT.from_pretrained(folder)
    assert difference(ours, theirs, tokens(2, 64)) < 1e-4
    ours.save_pretrained(folder)
    for a, b in zip(opened_by_transformers(folder).parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=2e-7, atol=0)


@pytest.mark.parametrize("types, window_size", [
    ([[["global"], 2]], None),
    ([[["local"], 2]], W),
    ([[["local", "global"], 1]], (W, 0)),
    ([[["global"], 1], [["local"], 1]], (0, W)),
])
def test_attention_types_of_a_gpt_neo_are_windows(folder, types, window_size):
    hf_neo(SHAPES["wide"], types).save_pretrained(folder)
    assert GPT.from_pretrained(folder).config.window_size == window_size


@pytest.mark.parametrize("make, key, value", [
    (hf_bigcode, "multi_query", False),
    (hf_bigcode, "activation_function", "gelu"),
    (hf_neo, "activation_function", "gelu"),
    (hf_neo, "window_size", 0),
    (hf_neo, "window_size", None),
    (hf_neo, "attention_types", None),
    (hf_neo, "attention_types", [[["global"], 1]]),
    (hf_neo, "attention_types", [[["global", "far"], 1]]),
    (hf_neo, "attention_types", [[["global"], "2"]]),
    (hf_neo, "attention_types", [["global", 2]]),
    (hf_neo, "attention_types", [[[["global"]], 2]]),
    (hf_neo, "attention_types", 7),
])
def test_config_of_another_bigcode_or_neo_is_refused(folder, make, key, value):
    make(SHAPES["wide"]).save_pretrained(folder)
    change_config(folder, **{key: value})
    with pytest.raises(InputError, match=f"config.json: {key}"):
        GPT.from_pretrained(folder)


# ------------------------------------------------------------------------------------------------
# Exports

EXPORTED = {
    "gpt2": {},
    "gpt2 untied": {"tied": False},
    "rope": ROPE,
    "rope, theta 500, untied": ROPE | {"rope_theta": 500.0, "tied": False},
    "rope+gqa": ROPE | GQA,
    "rope+swa": ROPE | SWA,
    "rope+gqa+swa": ROPE | GQA | SWA,
    "rope, window 0": ROPE | {"use_swa": True, "window_size": 0},
    "one key/value head": {"use_gqa": True, "n_kv_head": 1},
    # 64 channels: a gpt_neo divides queries by sqrt(D), which is exact for D = 16
    "swa": SWA | {"bias": False, "n_embd": 64},
    "windows that differ": {"use_swa": True, "window_size": (W, 0, W), "bias": False, "n_embd": 64},
    "without biases": {"bias": False},
    "rope, without biases": ROPE | {"bias": False},
}


def opened_by_transformers(folder):
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True)
    assert not any(report.values()), report   # nothing missing, unexpected or misshapen
    return model.eval()


@pytest.mark.parametrize("switches", EXPORTED.values(), ids=EXPORTED.keys())
def test_export_opens_in_transformers_with_equal_logits_and_comes_back_exactly(folder, switches):
    ours = tiny(**switches)
    ours.save_pretrained(folder)
    assert difference(ours, opened_by_transformers(folder), tokens(2, 32)) < 1e-5
    again = GPT.from_pretrained(folder)
    assert same_parameters(again, ours)
    if switches.get("window_size") == 0:   # no window, so that the switch comes back off
        again.config.use_swa, again.config.window_size = True, 0
    assert again.config == ours.config


def test_export_that_says_it_has_no_biases_and_has_some_is_refused(folder):
    tiny(bias=False).save_pretrained(folder)
    change_tensors(folder, replacing("h.1.ln_1.bias", torch.ones(32)))
    with pytest.raises(InputError, match="no biases, and h.1.ln_1.bias is one"):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_names_have_the_prefix_that_other_programs_expect(folder, tied):
    """OpenAI's files of tied models have none, which some programs count on."""
    tiny(tied=tied).save_pretrained(folder)
    names = safetensors.torch.load_file(folder / "model.safetensors")
    assert ("wte.weight" in names) == tied
    assert ("transformer.wte.weight" in names) != tied
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["n_ctx"] == 32


def test_export_makes_its_folder_and_assumes_the_end_of_text_of_GPT2_only(folder):
    folder = folder / "within" / "another"
    tiny().save_pretrained(folder)
    assert opened_by_transformers(folder).config.eos_token_id is None
    tiny(vocab_size=50257, n_embd=8, n_layer=1).save_pretrained(folder)
    assert opened_by_transformers(folder).config.eos_token_id == 50256


def test_export_replaces_an_earlier_one(folder):
    tiny().save_pretrained(folder)
    tiny(n_layer=1).save_pretrained(folder)
    assert GPT.from_pretrained(folder).config.n_layer == 1
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors"]


@pytest.mark.parametrize("switches", [
    GQA,
    GQA | SWA,
    {"use_gqa": True, "n_kv_head": 1} | SWA,
    ROPE | MIXED_WINDOWS,
    {"use_swa": True, "window_size": (4, 5, 6), "bias": False},
], ids=["two key/value heads", "gqa+swa", "one head+swa", "rope+windows", "three windows"])
def test_what_has_no_public_counterpart_cannot_be_exported(folder, switches):
    with pytest.raises(InputError, match="none of gpt2, .* has use_rope="):
        tiny(**switches).save_pretrained(folder)
    assert not folder.exists()


def test_windows_with_biases_in_q_k_and_v_cannot_be_exported(folder):
    with pytest.raises(InputError, match="its q, k and v have no biases"):
        tiny(**SWA).save_pretrained(folder)
    assert not folder.exists()


# ------------------------------------------------------------------------------------------------
# Changes to trained weights

@pytest.mark.parametrize("overrides, message", [
    ({"n_head": 2}, "n_head=2: .* has 4"),
    ({"n_layer": 1}, "n_layer=1: .* has 3"),
    ({"bias": False}, "bias=False: .* has True"),
    ({"tied": True}, "tied=True: .* has False"),
    ({"vocab_size": 40}, "vocab_size=40: .* has 101"),
    ({"n_legs": 4}, "n_legs is not a field"),
])
def test_what_the_weights_decide_cannot_be_overridden(folder, overrides, message):
    tiny(tied=False).save_pretrained(folder)
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(folder, **overrides)


def test_shorter_block_size_keeps_the_first_positions_and_a_longer_one_is_refused(folder):
    ours, idx = tiny(), tokens(1, 16)
    ours.save_pretrained(folder)
    shorter = GPT.from_pretrained(folder, block_size=16, dropout=0.1)
    assert shorter.config == GPTConfig(**(TINY | {"block_size": 16, "dropout": 0.1}))
    assert torch.equal(shorter.wpe.weight, ours.wpe.weight[:16])
    assert torch.allclose(shorter(idx)[0], ours(idx)[0], atol=1e-6)
    with pytest.raises(InputError, match="block_size=64.*32 positions"):
        GPT.from_pretrained(folder, block_size=64)


def test_rope_has_no_positions_to_run_out_of_and_none_to_give_back(folder):
    tiny(use_rope=True).save_pretrained(folder)
    assert GPT.from_pretrained(folder, block_size=64).config.block_size == 64
    with pytest.raises(InputError, match="use_rope=False: .* no learned positions"):
        GPT.from_pretrained(folder, use_rope=False, use_gqa=False, n_kv_head=None)


@pytest.mark.parametrize("K", [1, 2])
def test_mean_of_identical_heads_changes_nothing(folder, K):
    grouped, idx = tiny(use_gqa=True, n_kv_head=K), tokens(2, 32)
    repeated_heads(grouped).save_pretrained(folder)
    again = GPT.from_pretrained(folder, use_gqa=True, n_kv_head=K)
    assert again.config == grouped.config
    assert torch.allclose(again(idx)[0], grouped(idx)[0], atol=1e-5)


def test_pooled_head_is_the_mean_of_those_it_replaces(folder):
    H, K, D = 4, 2, 8
    plain = tiny()
    plain.save_pretrained(folder)
    pooled = GPT.from_pretrained(folder, use_gqa=True, n_kv_head=K)
    for kind in ("weight", "bias"):
        q, k, v = getattr(plain.h[1].attn.c_attn, kind).unflatten(0, (3, H, D))
        new_q, new_k, new_v = getattr(pooled.h[1].attn.c_attn, kind).split((H * D, K * D, K * D))
        assert torch.equal(new_q, q.flatten(0, 1))
        for old, new in ((k, new_k), (v, new_v)):
            assert torch.allclose(new[:D], (old[0] + old[1]) / 2)
            assert torch.allclose(new[D:], (old[2] + old[3]) / 2)


def test_fewer_heads_cannot_become_more(folder):
    tiny(use_rope=True, use_gqa=True, n_kv_head=2).save_pretrained(folder)
    with pytest.raises(InputError, match="n_kv_head=4: .* has 2 key/value heads"):
        GPT.from_pretrained(folder, n_kv_head=4)


# ------------------------------------------------------------------------------------------------
# Folders that are refused

TENSORS = {
    "two missing": (
        without("h.1.mlp.c_fc"),
        "lacks 2 tensors: h.1.mlp.c_fc.bias, h.1.mlp.c_fc.weight$",
    ),
    "one missing": (without("wpe"), "lacks 1 tensor: wpe.weight$"),
    "many missing": (without("h."), "lacks 36 tensors: h.0.attn.c_attn.bias, .*, …$"),
    "one unexpected": (
        replacing("transformer.surprise", torch.ones(1)),
        "has 1 unexpected tensor: surprise$",
    ),
    "a layer too many": (
        replacing("transformer.h.3.ln_1.bias", torch.ones(32)),
        "has 1 unexpected tensor: h.3.ln_1.bias$",
    ),
    "a short norm": (
        replacing("transformer.ln_f.weight", torch.ones(31)),
        r"ln_f.weight has shape \(31,\), the model \(32,\)$",
    ),
    "few positions": (
        replacing("transformer.wpe.weight", torch.ones(31, 32)),
        r"wpe.weight has shape \(31, 32\)",
    ),
    "a matrix transposed": (
        replacing("transformer.h.0.mlp.c_fc.weight", torch.ones(128, 32)),
        "c_fc.weight has shape",
    ),
    "a tied head that differs": (
        replacing("lm_head.weight", torch.ones(V, 32)),
        "lm_head.weight differs",
    ),
    "a tied head in float16": (
        replacing("lm_head.weight", torch.ones(V, 32).half()),
        "lm_head.weight differs",
    ),
}


@pytest.mark.parametrize("change, message", TENSORS.values(), ids=TENSORS.keys())
def test_missing_unexpected_and_misshapen_tensors_are_named(folder, change, message):
    hf_gpt2().save_pretrained(folder)
    change_tensors(folder, change)
    with pytest.raises(InputError, match=message):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize("shape", [(), (7,), (7, 7), (7, 7, 7)], ids=str)
@pytest.mark.parametrize("overrides", [{}, GQA], ids=["as they are", "pooled"])
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_misshapen_GPT2_heads_are_refused(folder, shape, overrides, kind):
    hf_gpt2().save_pretrained(folder)
    change_tensors(folder, replacing(f"transformer.h.0.attn.c_attn.{kind}", torch.ones(shape)))
    with pytest.raises(InputError, match="h.0.attn.c_attn|tensors are not those of a gpt2"):
        GPT.from_pretrained(folder, **overrides)


KEY = "model.layers.0.self_attn.k_proj.weight"
QUERY_BIAS = "model.layers.0.self_attn.q_proj.bias"


@pytest.mark.parametrize("change", [
    replacing(KEY, torch.ones(16, 31)),
    replacing(KEY, torch.ones(17, 32)),
    replacing(QUERY_BIAS, torch.tensor(1.0)),
    replacing("model.layers.0.mlp.c_fc.weight", torch.tensor(1.0)),
    without("1.self_attn.k_proj"),
], ids=["narrow key", "long key", "bias a number", "weight a number", "key missing"])
@pytest.mark.parametrize("overrides", [{}, {"n_kv_head": 1}], ids=["as they are", "pooled"])
def test_misshapen_StarCoder2_is_refused(folder, change, overrides):
    hf_starcoder2(use_bias=True).save_pretrained(folder)
    change_tensors(folder, change)
    with pytest.raises(InputError, match="h.0|h.1|tensors are not those of a starcoder2"):
        GPT.from_pretrained(folder, **overrides)


@pytest.mark.parametrize("key, value", [
    ("model_type", "llama"),
    ("model_type", ["gpt2"]),
    ("activation_function", "relu"),
    ("layer_norm_epsilon", 1e-6),
    ("n_inner", 7),
    ("scale_attn_by_inverse_layer_idx", True),
    ("scale_attn_weights", False),
    ("add_cross_attention", True),
    ("n_head", 5),
    ("n_embd", "wide"),
    ("n_layer", None),
    ("n_layer", 3.0),
])
def test_config_that_is_not_GPT2_is_refused(folder, key, value):
    hf_gpt2().save_pretrained(folder)
    change_config(folder, **{key: value})
    with pytest.raises(InputError, match=f"config.json.*{key}|config.json is not the config"):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize("key, value", [
    ("rope_scaling", {"type": "yarn"}),
    ("rope_parameters", {"rope_type": "yarn"}),
    ("rope_parameters", "yarn"),
    ("norm_epsilon", 1e-6),
    ("intermediate_size", 99),
    ("hidden_act", "silu"),
    ("num_key_value_heads", 3),
    ("num_key_value_heads", 2.0),
    ("num_key_value_heads", None),
    ("hidden_size", None),
    ("sliding_window", -1),
    ("sliding_window", "wide"),
])
def test_config_that_is_not_StarCoder2_is_refused(folder, key, value):
    hf_starcoder2().save_pretrained(folder)
    change_config(folder, **{key: value})
    with pytest.raises(ValueError, match="config.json|weights: window_size=-1"):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 50_000, '{"model_type": "gpt2"}'])
def test_broken_config_json_is_refused(folder, text):
    hf_gpt2().save_pretrained(folder)
    write_text(folder / "config.json", text)
    with pytest.raises(InputError, match="config.json"):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize("index", [
    "{",
    "[]",
    '{"weight_map": {"a": 3}}',
    '{"weight_map": {"a": "missing.safetensors"}}',
    '{"weight_map": {"a": "../elsewhere.safetensors"}}',
])
def test_broken_index_of_shards_is_refused(folder, index):
    hf_starcoder2().save_pretrained(folder)
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    write_text(folder / "model.safetensors.index.json", index)
    with pytest.raises(InputError, match="index.json"):
        GPT.from_pretrained(folder)


def test_unknown_name_and_a_folder_without_weights_are_refused(folder):
    folder.mkdir()
    for name in ("gpt3", folder):
        with pytest.raises(InputError, match="not one of gpt2, gpt2-medium"):
            GPT.from_pretrained(name)
    hf_gpt2().save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="neither model.safetensors"):
        GPT.from_pretrained(folder)


class RunsCode:
    def __reduce__(self):
        return print, ("code of a stranger",)


def test_pickle_that_would_run_code_is_refused(folder, capsys):
    hf_gpt2().save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"wte.weight": RunsCode()}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="pytorch_model.bin.*could run code"):
        GPT.from_pretrained(folder)
    assert "stranger" not in capsys.readouterr().out


@pytest.mark.parametrize("saved", [[1, 2], {"wte.weight": 3}, {1: torch.ones(2)}],
                         ids=["a list", "no tensors", "no names"])
def test_pickle_of_something_else_is_refused(folder, saved):
    hf_gpt2().save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(saved, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="pytorch_model.bin is not a dictionary of tensors"):
        GPT.from_pretrained(folder)


def test_pickle_cut_short_is_refused(folder):
    hf_gpt2().save_pretrained(folder)
    pickle_tensors(folder)
    pickled = folder / "pytorch_model.bin"
    raw = pickled.read_bytes()
    for length in (0, 1, 100, len(raw) // 2, len(raw) - 1):
        pickled.write_bytes(raw[:length])
        with pytest.raises(InputError, match="pytorch_model.bin"):
            GPT.from_pretrained(folder)
