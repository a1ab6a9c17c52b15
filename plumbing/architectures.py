"""
The public architectures that model.py computes exactly, as Hugging Face folders describe them.

  model_type    adds to GPT-2                               exported from
  gpt2          nothing                                     no switch
  gpt_bigcode   one key/value head for all query heads      use_gqa with n_kv_head=1
  gpt_neo       windows in some or all layers               use_swa, if q, k and v have no biases
  starcoder2    RoPE, fewer key/value heads, a window       use_rope, alone or with the others

A model is exchanged as plain data: the fields of its GPTConfig and its tensors, both by name. One
table per architecture says how its files name them. Reading and writing follow the same table.
"""

import math

import torch

from plumbing.errors import InputError, first_line

# Our modules; # stands for the layer
MODULES = (
    "wte", "wpe", "h.#.ln_1", "h.#.attn.c_attn", "h.#.attn.c_proj", "h.#.ln_2", "h.#.mlp.c_fc",
    "h.#.mlp.c_proj", "ln_f", "lm_head",
)
# The weights of these are (in, out) in GPT-2's files and (out, in) in nn.Linear.
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
GELU = ("gelu_new", "gelu_pytorch_tanh")   # two names of one function
# Causal masks, which old files hold as if they were weights
MASKS = (
    ".attn.bias", ".attn.masked_bias", ".attn.attention.bias", ".attn.attention.masked_bias",
)

# keys         field of GPTConfig: key of config.json
# fixed        key: the values that mean what model.py computes; the first is written, and assumed
#              if the key is missing
# mlp_width    the key that must be 4*n_embd
# dropout      keys that are written only: dropout belongs to a training run, not to the weights
# modules      our module: theirs, or the three that ours is the concatenation of
# transposed   endings of the tensors that are stored transposed
# no_bias      endings of our modules that have no bias there
GPT2 = {
    "model_type": "gpt2",
    "class": "GPT2LMHeadModel",
    "keys": {
        "block_size": "n_positions",
        "vocab_size": "vocab_size",
        "n_layer": "n_layer",
        "n_head": "n_head",
        "n_embd": "n_embd",
        "tied": "tie_word_embeddings",
    },
    "fixed": {
        "activation_function": GELU,
        "layer_norm_epsilon": (1e-5,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    "mlp_width": "n_inner",
    "dropout": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    "modules": {name: [f"transformer.{name}"] for name in MODULES} | {"lm_head": ["lm_head"]},
    "transposed": CONV1D,
    "no_bias": (),
}
GPT_BIGCODE = GPT2 | {
    "model_type": "gpt_bigcode",
    "class": "GPTBigCodeForCausalLM",
    "fixed": GPT2["fixed"] | {"multi_query": (True,)},
    "transposed": (),
}
GPT_NEO = {
    "model_type": "gpt_neo",
    "class": "GPTNeoForCausalLM",
    "keys": {   # and the windows, see neo_windows()
        "block_size": "max_position_embeddings",
        "vocab_size": "vocab_size",
        "n_layer": "num_layers",
        "n_head": "num_heads",
        "n_embd": "hidden_size",
        "tied": "tie_word_embeddings",
    },
    "fixed": {
        "activation_function": GELU,
        "layer_norm_epsilon": (1e-5,),
    },
    "mlp_width": "intermediate_size",
    "dropout": ("resid_dropout", "embed_dropout", "attention_dropout"),
    "modules": GPT2["modules"] | {
        "h.#.attn.c_attn": [
            "transformer.h.#.attn.attention.q_proj",
            "transformer.h.#.attn.attention.k_proj",
            "transformer.h.#.attn.attention.v_proj",
        ],
        "h.#.attn.c_proj": ["transformer.h.#.attn.attention.out_proj"],
    },
    "transposed": (),
    "no_bias": (".c_attn",),
}
STARCODER2 = {
    "model_type": "starcoder2",
    "class": "Starcoder2ForCausalLM",
    "keys": {
        "block_size": "max_position_embeddings",
        "vocab_size": "vocab_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_embd": "hidden_size",
        "tied": "tie_word_embeddings",
        "n_kv_head": "num_key_value_heads",
        "window_size": "sliding_window",
        "rope_theta": "rope_theta",
    },
    "fixed": {
        "hidden_act": GELU,
        "norm_epsilon": (1e-5,),
        "use_bias": (True, False),   # False: the linear layers have no biases, the norms do
    },
    "mlp_width": "intermediate_size",
    "dropout": ("residual_dropout", "embedding_dropout", "attention_dropout"),
    "modules": {
        "wte": ["model.embed_tokens"],
        "h.#.ln_1": ["model.layers.#.input_layernorm"],
        "h.#.attn.c_attn": [
            "model.layers.#.self_attn.q_proj",
            "model.layers.#.self_attn.k_proj",
            "model.layers.#.self_attn.v_proj",
        ],
        "h.#.attn.c_proj": ["model.layers.#.self_attn.o_proj"],
        "h.#.ln_2": ["model.layers.#.post_attention_layernorm"],
        "h.#.mlp.c_fc": ["model.layers.#.mlp.c_fc"],
        "h.#.mlp.c_proj": ["model.layers.#.mlp.c_proj"],
        "ln_f": ["model.norm"],
        "lm_head": ["lm_head"],
    },
    "transposed": (),
    "no_bias": (),
}
ARCHITECTURES = {t["model_type"]: t for t in (GPT2, GPT_BIGCODE, GPT_NEO, STARCODER2)}

# Fields whose key may be missing: types and default. All others must be positive integers.
OPTIONAL = {
    "tied": ((bool,), True),
    "window_size": ((int, type(None)), None),
    "rope_theta": ((int, float), 10000.0),
}


# --------------------------------------------------------------------------------------------------
# config.json -> fields

def read_config(hf, path):
    """
    The dictionary of config.json -> the table of its architecture, the fields of a GPTConfig.
    Raises InputError, with path in it, for what model.py does not compute.
    """
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise InputError(
            f"{path}: model_type={model_type!r} is none of {', '.join(ARCHITECTURES)}"
        )
    table = ARCHITECTURES[model_type]
    hf = unfold_rope(hf, path)
    fields = {field: read_field(hf, field, key, path) for field, key in table["keys"].items()}
    check_values(hf, fields, table, path)
    if table is STARCODER2:
        fields["use_rope"] = True
        if hf.get("use_bias") is False:
            table = table | {"no_bias": (".c_attn", ".c_proj", ".c_fc")}
    elif table is GPT_BIGCODE:
        fields["n_kv_head"] = 1
    elif table is GPT_NEO:
        fields["window_size"] = neo_windows(hf, fields["n_layer"], path)
    fields["use_gqa"] = fields.get("n_kv_head", fields["n_head"]) != fields["n_head"]
    if not fields["use_gqa"]:
        fields["n_kv_head"] = None
    fields["use_swa"] = fields.get("window_size") is not None
    if hf.get("bias") is False:   # in our own exports, see config_json()
        fields["bias"] = False
    return table, fields


def unfold_rope(hf, path):
    """hf with the keys of rope_parameters, where newer files keep rope_theta, beside the others"""
    rope = hf.get("rope_parameters")
    if isinstance(rope, dict):
        hf = hf | rope
    elif rope is not None:
        raise InputError(f"{path}: rope_parameters={rope!r:.100} is not a dictionary")
    if hf.get("rope_type", "default") != "default" or hf.get("rope_scaling"):
        raise InputError(f"{path}: it asks for a scaled RoPE, which model.py does not have")
    return hf


def check_values(hf, fields, table, path):
    """InputError for a value of hf that model.py does not have, and for sizes that do not fit"""
    mlp_width = {table["mlp_width"]: (4 * fields["n_embd"], None)}   # None: GPT-2's default
    for key, allowed in (table["fixed"] | mlp_width).items():
        value = hf.get(key, allowed[0])
        if value not in allowed:
            raise InputError(
                f"{path}: {key}={value!r} is not the architecture of model.py, which has "
                f"{allowed[0]!r}"
            )
    # GPTConfig checks these as well, but its error could not give the names of config.json.
    keys = table["keys"]
    for whole, part in (("n_embd", "n_head"), ("n_head", "n_kv_head")):
        if part in fields and fields[whole] % fields[part]:
            raise InputError(
                f"{path}: {keys[whole]}={fields[whole]} is not divisible by "
                f"{keys[part]}={fields[part]}"
            )


def read_field(hf, field, key, path):
    """The value of one field, if its type is right."""
    if field in OPTIONAL:
        types, default = OPTIONAL[field]
        value = hf.get(key, default)
        if type(value) not in types:
            raise InputError(f"{path}: {key}={value!r} is of type {type(value).__name__}")
        return value
    if key not in hf:
        raise InputError(f"{path}: {key} is missing")
    return positive(hf[key], key, path)


def positive(value, key, path):
    if type(value) is not int or value < 1:
        raise InputError(f"{path}: {key}={value!r} must be a positive integer")
    return value


def neo_windows(hf, n_layer, path):
    """attention_types, [[["global", "local"], 6]] for example, -> window_size"""
    layers = []
    types = hf.get("attention_types")
    try:
        for pattern, times in types:
            layers += list(pattern) * min(times, n_layer)
        are_known = set(layers) <= {"global", "local"}
    except (TypeError, ValueError):
        are_known = False
    if not are_known or len(layers) != n_layer:
        raise InputError(
            f"{path}: attention_types={types!r:.100} does not give 'global' or 'local' for each of "
            f"{n_layer} layers"
        )
    W = positive(hf.get("window_size", 256), "window_size", path)
    windows = tuple(W if kind == "local" else 0 for kind in layers)
    if len(set(windows)) == 1:
        return windows[0] or None
    return windows


# --------------------------------------------------------------------------------------------------
# Tensors

def tensor_names(table, n_layer):
    """Yield our name of each tensor, and the list of theirs: one, or three for q, k and v."""
    for module, their_modules in table["modules"].items():
        kinds = ("weight",) if module.endswith(table["no_bias"]) else ("weight", "bias")
        for layer in range(n_layer if "#" in module else 1):
            for kind in kinds:
                ours = f"{module}.{kind}".replace("#", str(layer))
                theirs = [f"{m}.{kind}".replace("#", str(layer)) for m in their_modules]
                yield ours, theirs


def our_tensors(theirs, table, fields, path):
    """
    Tensors of a Hugging Face folder -> tensors of model.py. Those without a place in model.py keep
    their names, so that copy_tensors can list them. Raises InputError, with path in it.
    """
    rest = {}
    for name, t in theirs.items():
        if not name.endswith(MASKS):
            rest[name.removeprefix("transformer.")] = t   # OpenAI's files lack the prefix
    tensors = {}
    try:
        for name, parts in tensor_names(table, fields["n_layer"]):
            parts = [part.removeprefix("transformer.") for part in parts]
            if all(part in rest for part in parts):
                pieces = [rest.pop(part) for part in parts]
                if table is GPT_NEO and len(pieces) > 1:
                    pieces[0] = pieces[0].float() * neo_scale(fields)
                t = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
                tensors[name] = t.t() if name.endswith(table["transposed"]) else t
        add_zero_biases(tensors, table["no_bias"])
    except (RuntimeError, TypeError) as e:   # shapes that cannot be transposed or concatenated
        raise InputError(
            f"{path}: its tensors are not those of a {table['model_type']}: {first_line(e)}"
        ) from None
    if tensors.keys() & rest.keys():
        raise InputError(f"{path} has {min(tensors.keys() & rest.keys())} twice")
    tensors |= rest
    if not fields.get("bias", True):
        drop_zero_biases(tensors, path)
    if fields["tied"] and "wte.weight" in tensors:
        head = tensors.pop("lm_head.weight", tensors["wte.weight"])   # old files hold both
        if not torch.equal(head, tensors["wte.weight"]):
            raise InputError(
                f"{path}: lm_head.weight differs from the embedding, but config.json says that "
                "they are tied"
            )
    return tensors


def their_tensors(ours, table, fields):
    """Tensors of model.py -> tensors of a Hugging Face folder"""
    D = fields["n_embd"] // fields["n_head"]
    kv_rows = (fields["n_kv_head"] or fields["n_head"]) * D
    tensors = {}
    for name, parts in tensor_names(table, fields["n_layer"]):
        if name not in ours:
            continue
        t = ours[name].t() if name.endswith(table["transposed"]) else ours[name]
        pieces = [t]
        if len(parts) > 1:
            pieces = list(t.split((fields["n_embd"], kv_rows, kv_rows)))
        if table is GPT_NEO and len(parts) > 1:
            pieces[0] = pieces[0] / neo_scale(fields)
        tensors.update(zip(parts, pieces, strict=True))
    if fields["tied"]:   # as OpenAI's own files have it, and some readers of gpt2 expect
        tensors = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    return tensors


def neo_scale(fields):
    """gpt_neo does not divide q k' by sqrt(D), so our query weights are sqrt(D) times theirs."""
    return math.sqrt(fields["n_embd"] // fields["n_head"])


def add_zero_biases(tensors, modules):
    """Give a bias to every module whose name ends in one of these. Zero is the same as none."""
    for name, t in list(tensors.items()):
        module = name.removesuffix(".weight")
        if module != name and module.endswith(modules):
            tensors.setdefault(f"{module}.bias", torch.zeros(len(t)))


def drop_zero_biases(tensors, path):
    for name in [name for name in tensors if name.endswith("bias")]:
        if tensors.pop(name).any():
            raise InputError(f"{path}: config.json says that it has no biases, and {name} is one")


# --------------------------------------------------------------------------------------------------
# Fields -> config.json

def table_for(config, tensors):
    """The architecture that has what config asks for; InputError if there is none."""
    kinds = windows(config)
    all_heads = (config["n_kv_head"] or config["n_head"]) == config["n_head"]
    if config["use_rope"]:
        if len(kinds) == 1:
            return STARCODER2
    elif kinds == {0} and all_heads:
        return GPT2
    elif kinds == {0} and config["n_kv_head"] == 1:
        return GPT_BIGCODE
    elif all_heads and len(kinds - {0}) == 1:
        biases = [t for name, t in tensors.items() if name.endswith("c_attn.bias")]
        if not any(t.any() for t in biases):
            return GPT_NEO
        raise InputError(
            "only gpt_neo has windows without RoPE, and its q, k and v have no biases: train with "
            "--bias=False, or pass on the checkpoint of train.py, which can hold any model"
        )
    names = ("use_rope", "use_gqa", "n_kv_head", "use_swa", "window_size")
    switches = ", ".join(f"{name}={config[name]}" for name in names)
    raise InputError(
        f"none of {', '.join(ARCHITECTURES)} has {switches}: pass on the checkpoint of train.py, "
        "which can hold any model"
    )


def windows(config):
    """The different windows of the layers; 0 = full attention."""
    window_size = config["window_size"]
    if isinstance(window_size, (tuple, list)):
        return set(window_size)
    return {window_size or 0}


def config_json(fields, table):
    """The fields of a GPTConfig -> the keys of config.json"""
    fields = dict(fields)
    fields["n_kv_head"] = fields["n_kv_head"] or fields["n_head"]
    hf = {
        "model_type": table["model_type"],
        "architectures": [table["class"]],
        "torch_dtype": "float32",
        "n_ctx": fields["block_size"],   # the old name, which converters to other formats read
    }
    W = max(windows(fields))
    if table is STARCODER2:
        fields["window_size"] = W or None   # one for all layers
        # newer versions of transformers look here
        hf["rope_parameters"] = {"rope_type": "default", "rope_theta": fields["rope_theta"]}
    if table is GPT_NEO:
        per_layer = fields["window_size"]
        if not isinstance(per_layer, (tuple, list)):
            per_layer = [per_layer] * fields["n_layer"]
        hf["window_size"] = W
        hf["attention_types"] = [[["local" if w else "global"], 1] for w in per_layer]
    for field, key in table["keys"].items():
        hf[key] = fields[field]
    for key, allowed in table["fixed"].items():
        hf[key] = allowed[0]
    hf[table["mlp_width"]] = 4 * fields["n_embd"]
    for key in table["dropout"]:
        hf[key] = fields["dropout"]
    if not fields["bias"]:
        hf["bias"] = False   # ours: the biases in the file are zeros that model.py does without
    return hf
