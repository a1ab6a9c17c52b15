"""
Trained weights from Hugging Face folders (model_type gpt2 or starcoder2), from the released GPT-2
and from our own checkpoints; and Hugging Face folders for transformers to read.

A model is exchanged as plain data: the fields of its GPTConfig and its tensors, both by name. The
two tables below say how a folder names them. Reading and writing follow the same table.
"""

import json
from pathlib import Path

import torch

from plumbing.checkpoints import all_tensors, load_checkpoint, load_pickle
from plumbing.downloads import download, hub_url
from plumbing.errors import InputError, first_line
from plumbing.files import replacing
from plumbing.run_folder import checkpoint_of_run
from plumbing.safetensors import read_safetensors, write_safetensors

GPT2_SIZES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
# The weights of these are (in, out) in GPT-2's files and (out, in) in nn.Linear.
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")

# keys         field of GPTConfig: key of config.json
# fixed        key: the values that mean what model.py computes; the first is written, and assumed
#              if the key is missing
# mlp_width    the key that must be 4*n_embd
# dropout      keys that are written only: dropout belongs to a training run, not to the weights
# modules      our module: theirs, or the three that ours is the concatenation of; # is the layer
# transposed   endings of the tensors that are stored transposed
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
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),   # two names of one function
        "layer_norm_epsilon": (1e-5,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    "mlp_width": "n_inner",
    "dropout": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    "modules": {
        "wte": ["transformer.wte"],
        "wpe": ["transformer.wpe"],
        "h.#.ln_1": ["transformer.h.#.ln_1"],
        "h.#.attn.c_attn": ["transformer.h.#.attn.c_attn"],
        "h.#.attn.c_proj": ["transformer.h.#.attn.c_proj"],
        "h.#.ln_2": ["transformer.h.#.ln_2"],
        "h.#.mlp.c_fc": ["transformer.h.#.mlp.c_fc"],
        "h.#.mlp.c_proj": ["transformer.h.#.mlp.c_proj"],
        "ln_f": ["transformer.ln_f"],
        "lm_head": ["lm_head"],
    },
    "transposed": CONV1D,
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
        "hidden_act": ("gelu_pytorch_tanh", "gelu_new"),
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
}
ARCHITECTURES = {"gpt2": GPT2, "starcoder2": STARCODER2}

# Fields whose key may be missing: types and default. All others must be positive integers.
OPTIONAL = {
    "tied": ((bool,), True),
    "window_size": ((int, type(None)), None),
    "rope_theta": ((int, float), 10000.0),
}


# --------------------------------------------------------------------------------------------------
# Finding weights

def load_pretrained(name_or_folder):
    """
    name_or_folder   a checkpoint file, a Hugging Face folder, the folder of a run, or one of
                     GPT2_SIZES; what could be several of these is the first that it is

    returns   the fields of a GPTConfig (dict), {name of a parameter: tensor}, a tokenizer_spec or
              None, and the path all this came from
    raises    InputError that names the file and what is wrong with it
    """
    path = Path(name_or_folder)
    name = str(name_or_folder)
    if path.is_file():
        return read_checkpoint(path)
    if (path / "config.json").exists():
        return read_folder(path)
    checkpoint = checkpoint_of_run(path)
    if checkpoint is not None:
        return read_checkpoint(checkpoint)
    if name in GPT2_SIZES:
        return read_folder(download_gpt2(name))
    raise InputError(
        f"{name}: not one of {', '.join(GPT2_SIZES)}, nor a folder with config.json and weights"
    )


def read_checkpoint(path):
    """A checkpoint of train.py, as load_pretrained returns it."""
    checkpoint = load_checkpoint(path)
    return checkpoint["gpt_config"], checkpoint["model"], checkpoint["tokenizer"], path


def download_gpt2(name):
    """The folder checkpoints/<name>, filled from the Hugging Face Hub unless it is complete."""
    folder = Path("checkpoints") / name
    for file in ("config.json", "model.safetensors"):
        if not (folder / file).exists():
            download(hub_url(f"openai-community/{name}/resolve/main/{file}"), folder / file)
    return folder


def read_folder(folder):
    """A Hugging Face folder, as load_pretrained returns it."""
    table, hf = read_config_json(folder / "config.json")
    fields = read_fields(hf, table, folder / "config.json")
    theirs = read_tensors(folder)
    try:
        tensors = our_tensors(theirs, table, fields["n_layer"])
        if hf.get("use_bias") is False:
            add_zero_biases(tensors, (".c_",))
    except (RuntimeError, TypeError) as e:   # shapes that cannot be transposed or concatenated
        model_type = table["model_type"]
        raise InputError(
            f"{folder}: its tensors are not those of a {model_type}: {first_line(e)}"
        ) from None
    if fields["tied"] and "wte.weight" in tensors:
        head = tensors.pop("lm_head.weight", tensors["wte.weight"])   # old files hold both
        if not torch.equal(head, tensors["wte.weight"]):
            raise InputError(
                f"{folder}: lm_head.weight differs from the embedding, but config.json says that "
                "they are tied"
            )
    # A folder has no tokenizer of ours; GPT-2's is recognised by the size of its vocabulary.
    tokenizer_spec = {"kind": "gpt2"} if fields["vocab_size"] == 50257 else None
    return fields, tensors, tokenizer_spec, folder


# --------------------------------------------------------------------------------------------------
# config.json -> fields

def read_config_json(path):
    """-> the table of its architecture; all its keys, with those of rope_parameters among them"""
    try:
        hf = json.loads(path.read_text(encoding="utf-8"))
        model_type = hf["model_type"]
        table = ARCHITECTURES.get(model_type)
        hf.update(hf.get("rope_parameters") or {})   # newer files keep rope_theta there
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise InputError(
            f"{path} is not the configuration of a gpt2 or starcoder2: {e!r}"
        ) from None
    if table is None:
        raise InputError(f"{path}: model_type={model_type!r} is neither gpt2 nor starcoder2")
    if hf.get("rope_type", "default") != "default" or hf.get("rope_scaling"):
        raise InputError(f"{path}: it asks for a scaled RoPE, which model.py does not have")
    return table, hf


def read_fields(hf, table, path):
    """The keys of config.json -> the fields of a GPTConfig. path is for errors."""
    keys = table["keys"]
    fields = {field: read_field(hf, field, key, path) for field, key in keys.items()}
    mlp_width = {table["mlp_width"]: (4 * fields["n_embd"], None)}   # None: GPT-2's default
    for key, allowed in (table["fixed"] | mlp_width).items():
        value = hf.get(key, allowed[0])
        if value not in allowed:
            raise InputError(
                f"{path}: {key}={value!r} is not the architecture of model.py, which has "
                f"{allowed[0]!r}"
            )
    if table is STARCODER2:
        fields["use_rope"] = True
        fields["use_gqa"] = True
        fields["use_swa"] = fields["window_size"] is not None
    # GPTConfig checks these as well, but its error could not give the names of config.json.
    for whole, part in (("n_embd", "n_head"), ("n_head", "n_kv_head")):
        if part in fields and fields[whole] % fields[part]:
            raise InputError(
                f"{path}: {keys[whole]}={fields[whole]} is not divisible by "
                f"{keys[part]}={fields[part]}"
            )
    return fields


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
    value = hf[key]
    if type(value) is not int or value < 1:
        raise InputError(f"{path}: {key}={value!r} must be a positive integer")
    return value


# --------------------------------------------------------------------------------------------------
# Tensors

def read_tensors(folder):
    """All tensors of a folder, by the names they have there."""
    safetensors = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    pickled = folder / "pytorch_model.bin"
    if safetensors.exists():
        return read_safetensors(safetensors)
    if index.exists():
        tensors = {}
        for file in files_of_index(index):
            tensors.update(read_safetensors(file))
        return tensors
    if pickled.exists():
        tensors = load_pickle(pickled)
        if not all_tensors(tensors):
            raise InputError(f"{pickled} is not a dictionary of tensors")
        return tensors
    raise InputError(
        f"{folder} has config.json but neither {safetensors.name}, {index.name} nor {pickled.name}"
    )


def files_of_index(index):
    """The paths of the files that share the tensors of a large model."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        paths = [(name, index.parent / name) for name in sorted(set(weight_map.values()))]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise InputError(f"{index} is broken: {e!r}") from None
    for name, path in paths:
        if path.name != name or not path.is_file():   # "../name" could be any file
            raise InputError(f"{index} names {name!r}, and there is no such file beside it")
    return [path for _, path in paths]


def tensor_names(table, n_layer):
    """Yield our name of every tensor, and their names of its parts, most often one."""
    for module, their_modules in table["modules"].items():
        for layer in range(n_layer if "#" in module else 1):
            for kind in ("weight", "bias"):
                ours = f"{module}.{kind}".replace("#", str(layer))
                theirs = [f"{m}.{kind}".replace("#", str(layer)) for m in their_modules]
                yield ours, theirs


def our_tensors(theirs, table, n_layer):
    """
    Tensors of a Hugging Face folder -> tensors of model.py. Those without a place in model.py keep
    their names, so that copy_tensors can list them.
    """
    rest = {}
    for name, t in theirs.items():
        if not name.endswith((".attn.bias", ".attn.masked_bias")):   # causal masks, in old files
            rest[name.removeprefix("transformer.")] = t              # the released files lack it
    tensors = {}
    for name, parts in tensor_names(table, n_layer):
        parts = [part.removeprefix("transformer.") for part in parts]
        if all(part in rest for part in parts):
            pieces = [rest.pop(part) for part in parts]
            t = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
            tensors[name] = t.t() if name.endswith(table["transposed"]) else t
    return tensors | rest


def their_tensors(ours, table, fields):
    """Tensors of model.py -> tensors of a Hugging Face folder"""
    D = fields["n_embd"] // fields["n_head"]
    qkv_rows = [fields["n_head"] * D, fields["n_kv_head"] * D, fields["n_kv_head"] * D]
    tensors = {}
    for name, parts in tensor_names(table, fields["n_layer"]):
        if name in ours:
            t = ours[name].t() if name.endswith(table["transposed"]) else ours[name]
            pieces = t.split(qkv_rows) if len(parts) > 1 else [t]
            tensors.update(zip(parts, pieces, strict=True))
    return tensors


def add_zero_biases(tensors, modules):
    """Give a bias to every module whose name contains one of these. Zero is the same as none."""
    for name, t in list(tensors.items()):
        if name.endswith("weight") and any(module in name for module in modules):
            tensors.setdefault(name.removesuffix("weight") + "bias", torch.zeros(len(t)))


# --------------------------------------------------------------------------------------------------
# Writing

def save_pretrained(folder, config, parameters):
    """
    Write config.json and model.safetensors, as transformers reads them.

    config       the fields of a GPTConfig
    parameters   {name: tensor}, a tied head only once, as wte
    raises       InputError for a model that is neither a gpt2 nor a starcoder2
    """
    table = table_for(config)
    fields = dict(config)
    fields["n_kv_head"] = config["n_kv_head"] or config["n_head"]
    fields["window_size"] = max(windows(config)) or None   # one for all layers
    tensors = {name: p.detach() for name, p in parameters.items()}
    if not fields["bias"]:
        add_zero_biases(tensors, (".c_", "ln_"))

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", their_tensors(tensors, table, fields))
    with replacing(folder / "config.json") as f:
        f.write(json.dumps(config_json(fields, table), indent=2).encode())


def config_json(fields, table):
    """The fields of a GPTConfig -> the keys of config.json"""
    hf = {
        "model_type": table["model_type"],
        "architectures": [table["class"]],
        "torch_dtype": "float32",
    }
    for field, key in table["keys"].items():
        hf[key] = fields[field]
    for key, allowed in table["fixed"].items():
        hf[key] = allowed[0]
    hf[table["mlp_width"]] = 4 * fields["n_embd"]
    for key in table["dropout"]:
        hf[key] = fields["dropout"]
    if table is STARCODER2:   # newer versions of transformers look here
        hf["rope_parameters"] = {"rope_type": "default", "rope_theta": fields["rope_theta"]}
    # The end of a text: GPT-2's <|endoftext|>. In another vocabulary it is not known here.
    end = 50256 if fields["vocab_size"] == 50257 else None
    hf["bos_token_id"] = end
    hf["eos_token_id"] = end
    return hf


def table_for(config):
    """The architecture that has all that config asks for."""
    if not (config["use_rope"] or config["use_gqa"] or config["use_swa"]):
        return GPT2
    if config["use_rope"] and len(windows(config)) == 1:
        return STARCODER2
    names = ("use_rope", "use_gqa", "use_swa", "window_size")
    switches = ", ".join(f"{name}={config[name]}" for name in names)
    raise InputError(
        f"{switches}: neither format we write holds it: gpt2 has no switch on, starcoder2 has RoPE "
        "and one window for all layers. A checkpoint of train.py can hold any model"
    )


def windows(config):
    """The different windows of the layers; 0 = full attention."""
    window_size = config["window_size"]
    if isinstance(window_size, (tuple, list)):
        return set(window_size)
    return {window_size or 0}
