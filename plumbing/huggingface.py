"""
Trained weights from Hugging Face folders or the Hub, from the released GPT-2, from our own
checkpoints and from nanoGPT's; and Hugging Face folders for transformers to read.
"""

from pathlib import Path

from plumbing.architectures import (
    add_zero_biases,
    config_json,
    our_tensors,
    read_config,
    table_for,
    their_tensors,
)
from plumbing.checkpoints import (
    all_tensors,
    check_checkpoint,
    is_nanogpts,
    load_pickle,
    open_checkpoint,
)
from plumbing.errors import InputError
from plumbing.hub import HUB_ID, RELEASES, WEIGHTS, fetch_repository, weight_files
from plumbing.json_files import read_json, write_json
from plumbing.run_folder import checkpoint_of_run
from plumbing.safetensors import read_safetensors, write_safetensors
from plumbing.tokenizer import Tokenizer
from plumbing.tokenizer_files import read_tokenizer, write_tokenizer

# The vocab_size that nanoGPT gives a model of GPT-2's tokens: exact, or padded to a multiple of 64
NANOGPT_BPE = (50257, 50304)


# --------------------------------------------------------------------------------------------------
# Reading

def load_pretrained(name_or_folder):
    """
    name_or_folder   a checkpoint file, a Hugging Face folder, the folder of a run, one of
                     RELEASES, or an owner/name on the Hub; a name that fits several of these
                     is taken as the first

    returns   the fields of a GPTConfig (dict), {name of a parameter: tensor}, a tokenizer_spec or
              None, and the path all this came from
    raises    InputError that names the file and what is wrong with it
    """
    path = find(name_or_folder)
    if path.is_file():
        return read_checkpoint(path)
    hf = read_json(path / "config.json")
    table, fields = read_config(hf, path / "config.json")
    theirs = read_tensors(path)
    check_size(fields, theirs, path)
    tensors = our_tensors(theirs, table, fields, path)
    return fields, tensors, tokenizer_of_folder(path, hf), path


def load_tokenizer(name_or_folder):
    """The tokenizer_spec alone of what load_pretrained takes; InputError if it has none"""
    if name_or_folder in RELEASES:
        return {"kind": "gpt2"}
    path = find(name_or_folder, weights=False)
    if path.is_file():
        spec = read_checkpoint(path)[2]
    else:
        hf = read_json(path / "config.json")
        read_config(hf, path / "config.json")
        spec = tokenizer_of_folder(path, hf)
    if spec is None:
        raise InputError(f"{path} has no tokenizer")
    return spec


def find(name_or_folder, weights=True):
    """The path of the checkpoint or of the Hugging Face folder, which is fetched if need be"""
    path = Path(name_or_folder)
    name = str(name_or_folder)
    if path.suffix == ".safetensors":
        raise InputError(f"{name}: give its folder, which has config.json too")
    if path.is_file() or (path / "config.json").exists():
        return path
    checkpoint = checkpoint_of_run(path)
    if checkpoint is not None:
        return checkpoint
    is_path = path.parent.is_dir()   # out/x is a path if there is a folder out
    if name in RELEASES or (HUB_ID.fullmatch(name) and not is_path):
        return fetch_repository(name, weights)
    raise InputError(
        f"{name}: not one of {', '.join(RELEASES)}, nor owner/name on the Hugging Face Hub, nor "
        "a folder with config.json and weights"
    )


def read_checkpoint(path):
    """A checkpoint of train.py or of nanoGPT, as load_pretrained returns it."""
    checkpoint = open_checkpoint(path)
    if is_nanogpts(checkpoint):
        return read_nanogpt(checkpoint, path)
    check_checkpoint(checkpoint, path)
    check_size(checkpoint["gpt_config"], checkpoint["model"], path)
    return checkpoint["gpt_config"], checkpoint["model"], checkpoint["tokenizer"], path


def read_nanogpt(checkpoint, path):
    """A checkpoint of nanoGPT, whose parameters have the same names behind prefixes"""
    fields = checkpoint["model_args"]
    if not isinstance(fields, dict) or not all_tensors(checkpoint.get("model")):
        raise InputError(f"{path} is a broken checkpoint of nanoGPT")
    fields = {field: value for field, value in fields.items() if field != "dropout"}
    tensors = {}
    for name, t in checkpoint["model"].items():
        name = name.removeprefix("_orig_mod.")   # of a compiled model
        if not name.endswith(".attn.bias"):      # a mask
            tensors[name.removeprefix("transformer.")] = t
    check_size(fields, tensors, path)
    spec = {"kind": "gpt2"} if fields.get("vocab_size") in NANOGPT_BPE else None
    return fields, tensors, spec, path


def check_size(fields, tensors, path):
    """
    InputError for the configuration of a far larger model than the tensors are, which would take
    all memory before anything is found to be missing.
    """
    numbers = [fields.get(name) for name in ("n_layer", "vocab_size", "n_embd", "block_size")]
    if not all(type(number) is int for number in numbers):
        return   # GPTConfig says what is wrong
    n_layer, vocab_size, n_embd, block_size = numbers
    positions = 0 if fields.get("use_rope") else block_size
    needed = (vocab_size + positions + 12 * n_layer * n_embd) * n_embd
    if needed > 10**7 + 100 * sum(t.numel() for t in tensors.values()):
        raise InputError(
            f"{path}: its tensors are not those of a model with n_layer={n_layer}, "
            f"n_embd={n_embd}, vocab_size={vocab_size} and block_size={block_size}"
        )


def tokenizer_of_folder(folder, hf):
    """hf: the folder's config.json. Returns a tokenizer_spec, or None if there is no tokenizer"""
    spec = read_tokenizer(folder, hf.get("eos_token_id"))
    if spec is None:
        is_ours = folder.parent.resolve() == Path("checkpoints").resolve()
        is_release = is_ours and folder.name in RELEASES
        return {"kind": "gpt2"} if is_release else None
    found = Tokenizer(spec).vocab_size
    if found > hf["vocab_size"]:
        raise InputError(
            f"{folder}: its tokenizer has {found:,} ids, its model {hf['vocab_size']:,}"
        )
    return spec


def read_tensors(folder):
    """All tensors of a folder, by the names they have there"""
    tensors = {}
    for file in weight_files(folder):
        if not file.is_file() and file.name == WEIGHTS[2]:
            raise InputError(f"{folder} has config.json but neither {', '.join(WEIGHTS[:2])} nor "
                             f"{file.name}")
        if not file.is_file():
            raise InputError(f"{folder / WEIGHTS[1]} names {file.name}, and there is no such file "
                             "beside it")
        if file.suffix == ".bin":
            tensors = load_pickle(file)
            if not all_tensors(tensors):
                raise InputError(f"{file} is not a dictionary of tensors")
        else:
            tensors |= read_safetensors(file)
    return tensors


# --------------------------------------------------------------------------------------------------
# Writing

def save_pretrained(folder, config, parameters, tokenizer_spec):
    """
    Write a folder that transformers reads: config.json, model.safetensors, generation_config.json
    and, where it is known, the tokenizer, to whose number of ids the vocabulary is cut.

    config       the fields of a GPTConfig
    parameters   {name: tensor}, a tied head only once, as wte
    raises       InputError for a model that is none of ARCHITECTURES
    """
    tensors = {name: p.detach() for name, p in parameters.items()}
    tokenizer = Tokenizer(tokenizer_spec) if tokenizer_spec else None
    if tokenizer and tokenizer.vocab_size > config["vocab_size"]:
        raise InputError(f"tokenizer_spec has {tokenizer.vocab_size:,} ids, the model "
                         f"{config['vocab_size']:,}")
    if tokenizer and tokenizer.vocab_size < config["vocab_size"]:   # padded for training
        config = config | {"vocab_size": tokenizer.vocab_size}
        for name in ("wte.weight", "lm_head.weight"):
            if name in tensors:
                tensors[name] = tensors[name][:tokenizer.vocab_size]
    table = table_for(config, tensors)
    if not config["bias"]:
        add_zero_biases(tensors, (".c_attn", ".c_proj", ".c_fc", "ln_1", "ln_2", "ln_f"))
    hf = config_json(config, table)
    # The ids that begin and end a text: what generates from an empty prompt begins with the first.
    start = end = 50256 if config["vocab_size"] == 50257 else None   # as transformers assumes
    if tokenizer:
        start = tokenizer.start
        end = tokenizer.end
    ids = {"bos_token_id": start, "eos_token_id": end}

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", their_tensors(tensors, table, config))
    if tokenizer:
        write_tokenizer(folder, tokenizer, config["block_size"])
    else:
        print(f"note: no tokenizer was written to {folder}, because none is known for this model: "
              "other programs need one to read and write text")
    write_json(folder / "generation_config.json", ids)
    write_json(folder / "config.json", hf | ids)
