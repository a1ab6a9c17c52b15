"""
Weights in files: the released GPT-2, Hugging Face folders of gpt2 and starcoder2, the safetensors format, checkpoints.

Trust nothing: every size and offset is checked, no file that is loaded can run code, and a file that is written replaces
the one before whole or not at all.
"""

import json
import math
import os
import pickle
import sys
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from model import GPTConfig, InputError

GPT2_SIZES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")   # GPT-2 was released with (in, out); nn.Linear keeps (out, in)
STARCODER2 = {"model.embed_tokens.": "wte.", "model.layers.": "h.", "model.norm.": "ln_f.", "input_layernorm": "ln_1",
              "post_attention_layernorm": "ln_2", "self_attn.o_proj": "attn.c_proj"}   # its names -> ours
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


# ----------------------------------------------------------------------------------------------------------------------
# Models

def load(name_or_folder):
    """
    A released name, a folder or a checkpoint -> GPTConfig, {name of a parameter: tensor}, tokenizer or None, the path they came
    from. Raises ValueError that names the file and what is wrong with it.
    """
    path = Path(name_or_folder)
    if path.is_dir() and not (path / "config.json").exists():
        path = of_run(path) or path
    if str(name_or_folder) in GPT2_SIZES and not path.is_file() and not (path / "config.json").exists():
        path = download_gpt2(str(name_or_folder))
    if path.is_file():
        checkpoint = load_checkpoint(path)
        return GPTConfig(**checkpoint["gpt_config"]), checkpoint["model"], checkpoint["tokenizer"], path
    if (path / "config.json").exists():
        config, tensors = read_folder(path)
        return config, tensors, {"kind": "gpt2"} if config.vocab_size == 50257 else None, path   # the size is all that tells
    raise InputError(f"{name_or_folder}: not one of {', '.join(GPT2_SIZES)}, nor a folder with config.json and weights")


def of_run(out_dir):
    """The checkpoint to use of a run: its best.pt, else its ckpt.pt, else None. The folder may hold an export as well."""
    return next((path for name in ("best.pt", "ckpt.pt") if (path := Path(out_dir) / name).exists()), None)


def download_gpt2(name):
    """checkpoints/<name>, filled from the Hugging Face Hub, or the mirror that HF_ENDPOINT names, unless it is there."""
    from prepare_data import download, hub_url
    folder = Path("checkpoints") / name
    for file in ("config.json", "model.safetensors"):
        if not (folder / file).exists():
            download(hub_url(f"openai-community/{name}/resolve/main/{file}"), folder / file)
    return folder


def adapt(tensors, theirs, ours, path):
    """Change the tensors of a model with the config theirs so that they fit one with the config ours; ValueError where none can."""
    tensors = dict(tensors)
    for field in ("vocab_size", "n_layer", "n_head", "n_embd", "bias", "tied"):
        if getattr(ours, field) != getattr(theirs, field):
            raise InputError(f"{field}={getattr(ours, field)}: {path} has {getattr(theirs, field)}, which its weights decide")
    if theirs.use_rope and not ours.use_rope:
        raise InputError(f"use_rope=False: {path} was trained with RoPE and has no learned positions")
    if ours.use_rope and not theirs.use_rope:
        tensors.pop("wpe.weight", None)
        print(f"warning: use_rope=True drops the learned positions of {path}: train the model before you use it", file=sys.stderr)
    elif not ours.use_rope and ours.block_size != theirs.block_size:
        if ours.block_size > theirs.block_size:
            raise InputError(f"block_size={ours.block_size}: {path} has only {theirs.block_size} positions")
        tensors.update((k, t[:ours.block_size]) for k, t in tensors.items() if k == "wpe.weight")
    H, K, new_K = ours.n_head, theirs.n_kv_head or theirs.n_head, ours.n_kv_head or ours.n_head
    if new_K != K:
        if K % new_K:
            raise InputError(f"n_kv_head={new_K}: {path} has {K} key/value heads, and only a divisor of that can be made from them")
        for name, t in tensors.items():
            if ".c_attn." in name:   # (H+2K)*D rows: of each K/new_K heads the mean
                if len(t) != (H + 2 * K) * ours.n_embd // H:
                    raise InputError(f"{path}: {name} has {len(t)} rows, {H} heads and twice {K} need {(H + 2 * K) * ours.n_embd // H}")
                q, kv = t.unflatten(0, (H + 2 * K, -1)).split((H, 2 * K))
                tensors[name] = torch.cat((q, kv.unflatten(0, (2 * new_K, -1)).mean(1))).flatten(0, 1)
    return tensors


@torch.no_grad()
def copy(model, tensors, path):
    """Copy tensors (by name) into model, in its dtype; ValueError unless names and shapes are the model's. path is for the error."""
    own = dict(model.named_parameters())
    missing, unknown = own.keys() - tensors.keys(), tensors.keys() - model.state_dict().keys()
    for what, names in (("lacks", missing), ("has the unknown", unknown)):
        if names:
            raise InputError(f"{path} {what} {len(names)} tensor(s): {', '.join(sorted(names)[:3])}{' …' * (len(names) > 3)}")
    for name, p in own.items():
        if p.shape != tensors[name].shape:
            raise InputError(f"{path}: {name} has shape {tuple(tensors[name].shape)}, the model {tuple(p.shape)}")
        p.copy_(tensors[name])


# ----------------------------------------------------------------------------------------------------------------------
# Hugging Face folders

def read_folder(folder):
    """A folder of model_type gpt2 or starcoder2 -> GPTConfig, {name of a parameter: tensor}"""
    where = folder / "config.json"
    try:
        hf = json.loads(where.read_text(encoding="utf-8"))
        read_config = {"gpt2": gpt2_config, "starcoder2": starcoder2_config}.get(hf["model_type"])
        if read_config is None:
            raise InputError(f"{where}: model_type={hf['model_type']!r} is neither gpt2 nor starcoder2")
        fields, fixed = read_config(hf)
        config = GPTConfig(tied=hf.get("tie_word_embeddings", True), **fields)
    except InputError as e:
        raise InputError(f"{where}: {str(e).removeprefix(f'{where}: ')}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(f"{where} is not the configuration of a gpt2 or starcoder2: {e!r}") from None
    for key, allowed in fixed.items():
        if hf.get(key, allowed[0]) not in allowed:
            raise InputError(f"{where}: {key}={hf[key]!r} is not the architecture of model.py, which has {allowed[0]!r}")

    try:
        tensors = own_names(read_tensors(folder), hf)
    except (RuntimeError, TypeError) as e:   # shapes that do not go together
        raise InputError(f"{folder}: its tensors are not those of a {hf['model_type']}: {str(e).splitlines()[0]}") from None
    if config.tied and "wte.weight" in tensors:
        if not torch.equal(tensors.pop("lm_head.weight", tensors["wte.weight"]), tensors["wte.weight"]):
            raise InputError(f"{folder}: lm_head.weight differs from the embedding, and config.json says that they are tied")
    return config, tensors


def own_names(theirs, hf):
    """Tensors as a Hugging Face folder has them -> as model.py has them"""
    tensors = {}
    for name, t in theirs.items():
        if hf["model_type"] == "gpt2":
            name = name.removeprefix("transformer.")
            t = t.t() if name.endswith(CONV1D) and t.dim() == 2 else t
        else:
            for a, b in STARCODER2.items():
                name = name.replace(a, b)
        if not name.endswith((".attn.bias", ".attn.masked_bias")):   # old files keep the causal mask as a buffer
            tensors[name] = t
    for name in [n for n in tensors if ".self_attn.q_proj." in n]:
        parts = [name.replace("q_proj", part) for part in ("q_proj", "k_proj", "v_proj")]
        if all(part in tensors for part in parts):
            tensors[name.replace("self_attn.q_proj", "attn.c_attn")] = torch.cat([tensors.pop(part) for part in parts])
    if hf.get("use_bias") is False:   # StarCoder2 without: linear layers alone, its layer norms keep theirs. Zero is the same
        tensors |= {n.replace("weight", "bias"): torch.zeros(len(t)) for n, t in tensors.items() if ".c_" in n and n.endswith("weight")}
    return tensors


def gpt2_config(hf):
    """config.json of a GPT-2 -> fields of GPTConfig, {key: the values model.py can have}"""
    # Dropout is a setting of their training, not of the weights: it is asked for anew.
    return (dict(block_size=hf["n_positions"], vocab_size=hf["vocab_size"], n_layer=hf["n_layer"], n_head=hf["n_head"], n_embd=hf["n_embd"]),
            dict(activation_function=("gelu_new", "gelu_pytorch_tanh"), layer_norm_epsilon=(1e-5,), n_inner=(None, 4 * hf["n_embd"]),
                 scale_attn_weights=(True,), scale_attn_by_inverse_layer_idx=(False,), add_cross_attention=(False,)))


def starcoder2_config(hf):
    """The same of a StarCoder2."""
    rope = hf.get("rope_parameters") or hf   # where newer files keep rope_theta
    if rope.get("rope_type", "default") != "default" or hf.get("rope_scaling"):
        raise InputError("rope_parameters ask for a scaled RoPE, which model.py does not have")
    window = hf.get("sliding_window")
    return (dict(block_size=hf["max_position_embeddings"], vocab_size=hf["vocab_size"], n_layer=hf["num_hidden_layers"],
                 n_head=hf["num_attention_heads"], n_embd=hf["hidden_size"], use_rope=True, rope_theta=float(rope.get("rope_theta", 10000.0)),
                 use_gqa=True, n_kv_head=hf["num_key_value_heads"], use_swa=window is not None, window_size=window),
            dict(hidden_act=("gelu_pytorch_tanh", "gelu_new"), norm_epsilon=(1e-5,), intermediate_size=(4 * hf["hidden_size"],)))


def read_tensors(folder):
    """All tensors of a folder, by the names they have there."""
    index, whole, old = (folder / f for f in ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin"))
    if whole.exists():
        return read_safetensors(whole)
    if index.exists():
        try:
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise InputError(f"{index} is broken: {e!r}") from None
        if bad := [f for f in files if not isinstance(f, str) or Path(f).name != f or not (folder / f).is_file()]:
            raise InputError(f"{index} names {bad[0]!r}, and there is no such file beside it")
        return {name: t for f in files for name, t in read_safetensors(folder / f).items()}
    if old.exists():
        tensors = load_pickle(old)
        if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
            raise InputError(f"{old} is not a dictionary of tensors")
        return tensors
    raise InputError(f"{folder} has config.json but neither {whole.name}, {index.name} nor {old.name}")


def save(model, folder):
    """config.json and model.safetensors, as transformers reads them."""
    c = model.config
    end = 50256 if c.vocab_size == 50257 else None   # GPT-2's <|endoftext|>; of another vocabulary we do not know
    common = dict(vocab_size=c.vocab_size, tie_word_embeddings=c.tied, torch_dtype="float32", bos_token_id=end, eos_token_id=end)
    if not (c.use_rope or c.use_gqa or c.use_swa):
        config = dict(model_type="gpt2", architectures=["GPT2LMHeadModel"], n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
                      n_head=c.n_head, layer_norm_epsilon=1e-5, activation_function="gelu_new", resid_pdrop=c.dropout,
                      embd_pdrop=c.dropout, attn_pdrop=c.dropout)
    elif c.use_rope and len(set(c.windows)) == 1:
        config = dict(model_type="starcoder2", architectures=["Starcoder2ForCausalLM"], max_position_embeddings=c.block_size,
                      hidden_size=c.n_embd, intermediate_size=4 * c.n_embd, num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
                      num_key_value_heads=c.n_kv_head or c.n_head, sliding_window=c.windows[0] or None, rope_theta=c.rope_theta,
                      rope_parameters=dict(rope_type="default", rope_theta=c.rope_theta), hidden_act="gelu_pytorch_tanh", norm_epsilon=1e-5,
                      use_bias=True, residual_dropout=c.dropout, embedding_dropout=c.dropout, attention_dropout=c.dropout)
    else:
        raise InputError(f"use_rope={c.use_rope}, use_gqa={c.use_gqa}, use_swa={c.use_swa}, window_size={c.window_size}: neither "
                         f"format we write holds it: gpt2 has no switch on, starcoder2 has RoPE and one window for all layers. "
                         f"train.py's checkpoint keeps it")

    tensors = {name: p.detach() for name, p in model.named_parameters()}   # a tied head is listed once, as wte
    if not c.bias:   # both architectures have biases: zero is the same
        tensors |= {n.removesuffix("weight") + "bias": torch.zeros(len(t)) for n, t in tensors.items() if n.startswith(("h.", "ln_f"))}
    theirs = {}
    for name, t in tensors.items():
        if config["model_type"] == "gpt2":
            theirs[name if name == "lm_head.weight" else f"transformer.{name}"] = t.t() if name.endswith(CONV1D) else t
        elif ".c_attn." in name:
            sizes = [n * c.n_embd // c.n_head for n in (c.n_head, config["num_key_value_heads"], config["num_key_value_heads"])]
            for part, rows in zip("qkv", t.split(sizes)):
                theirs[name.replace("h.", "model.layers.", 1).replace("attn.c_attn", f"self_attn.{part}_proj")] = rows
        else:
            for their, ours in STARCODER2.items():
                name = name.replace(ours, their, 1)
            theirs[name] = t
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", theirs)
    with replacing(folder / "config.json") as f:
        f.write(json.dumps(common | config, indent=2).encode())


# ----------------------------------------------------------------------------------------------------------------------
# File formats

def read_safetensors(path):
    """{name: tensor} of a file in the safetensors format: 8 bytes of header length, a JSON header, the raw tensors."""
    size, tensors = os.path.getsize(path), {}
    try:
        with open(path, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if not 2 <= length <= min(size - 8, 100_000_000):   # before reading it: the length itself may lie
                raise ValueError(f"the header cannot be {length:,} bytes long in a file of {size:,}")
            header = json.loads(f.read(length))
            header.pop("__metadata__", None)
            end = 0
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                if entry["dtype"] not in DTYPES:
                    raise ValueError(f"{name} is of dtype {entry['dtype']}, and not one of {', '.join(DTYPES)}")
                dtype, shape, (start, stop) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
                if any(type(n) is not int or n < 0 for n in shape):
                    raise ValueError(f"{name} has shape {shape}")
                # The tensors must tile the rest of the file: no gap, no overlap, nothing past the end.
                if start != end or stop - start != math.prod(shape) * dtype.itemsize or 8 + length + stop > size:
                    raise ValueError(f"{name}, {entry['dtype']} of shape {shape}, cannot be bytes {start} to {stop}")
                raw, end = bytearray(f.read(stop - start)), stop
                tensors[name] = (torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)).view(shape)
        if 8 + length + end != size:
            raise ValueError(f"the tensors end at byte {8 + length + end:,} of {size:,}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise InputError(f"{path} cannot be read as safetensors: {e}; if it is damaged, delete it and fetch it again") from None
    return tensors


def write_safetensors(path, tensors):
    """Write {name: tensor} as float32."""
    header, end = {"__metadata__": {"format": "pt"}}, 0   # transformers asks for this entry
    for name, w in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(w.shape), "data_offsets": [end, end + 4 * w.numel()]}
        end += 4 * w.numel()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)   # tensors start at a multiple of 8 bytes
    with replacing(path) as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for w in tensors.values():
            f.write(w.to("cpu", torch.float32).contiguous().numpy().data)


def load_pickle(path, mmap=False):
    """What torch.save wrote, if it is tensors and plain values: anything that would run code is refused."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as e:
        if "GLOBAL" in str(e):   # the pickle asks for a function that torch does not know to be harmless
            raise InputError(f"{path} holds more than tensors and plain values: loading it could run code") from None
        raise InputError(f"{path} is cut short or not a checkpoint") from None
    except Exception as e:
        # torch reports a damaged file as RuntimeError, EOFError, OSError and more: to the user they are all one thing
        raise InputError(f"{path} is cut short or not a checkpoint: {str(e).splitlines()[0] if str(e) else e!r}") from None


def load_checkpoint(path):
    """The dictionary train.py saved at path."""
    # Mapped, all processes of a machine share one copy; Windows could not replace the file meanwhile.
    checkpoint = load_pickle(path, mmap=sys.platform != "win32")
    kinds = dict(model=dict, optimizer=dict, gpt_config=dict, train_config=dict, step=int, best_val_loss=float, tokenizer=dict)
    if not isinstance(checkpoint, dict) or not all(isinstance(checkpoint.get(k), kind) for k, kind in kinds.items()):
        raise InputError(f"{path} is not a checkpoint of train.py")
    try:
        checkpoint["gpt_config"] = asdict(GPTConfig(**checkpoint["gpt_config"]))
    except (TypeError, InputError) as e:
        raise InputError(f"{path} is not a checkpoint of train.py: {e}") from None
    return checkpoint


def save_checkpoint(path, model, optimizers, config, step, best_val_loss, tokenizer):
    """
    All that is needed to go on, to sample or to start from, in one format for all modes of train.py: every rank takes part, rank 0
    writes. The file changes whole or not at all.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0

    def whole(t):   # FSDP: put together, which every rank must ask for in the same order
        t = t.full_tensor() if hasattr(t, "full_tensor") else t
        return t.detach().cpu() if rank == 0 else None
    params = {name: whole(p) for name, p in model.named_parameters()}
    states = {p: state for optimizer in optimizers for p, state in optimizer.state.items()}
    states = {name: {k: whole(t) for k, t in states[p].items()} for name, p in model.named_parameters() if p in states}
    if rank > 0:
        return
    if model.config.tied:
        params["lm_head.weight"] = params["wte.weight"]
    checkpoint = dict(model=params, optimizer=states, gpt_config=asdict(model.config), train_config=asdict(config), step=step,
                      best_val_loss=best_val_loss, tokenizer=tokenizer,
                      rng=torch.get_rng_state())   # for the record: every step seeds anew, so that nothing depends on it
    try:
        with replacing(path) as f:
            torch.save(checkpoint, f)
    except (OSError, RuntimeError) as e:   # torch reports a full disk as either
        raise InputError(f"cannot save {path} ({str(e).splitlines()[0]}): what was there before is untouched; when that is put "
                         f"right, go on with --init_from=auto") from None


@contextmanager
def replacing(path):
    """`with replacing(path) as f`: path changes at the end, whole or not at all, even if the power fails in between."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())   # the bytes reach the disk before the name does
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
