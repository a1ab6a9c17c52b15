"""
The tokenizer's files of a Hugging Face folder: tokenizer.json, or vocab.json and merges.txt, which
are GPT-2's own. They are read only if tokenizer.py gives every text the same ids.
"""

import math
from pathlib import Path

from plumbing.errors import InputError, first_line
from plumbing.json_files import read_json, write_json
from plumbing.tokenizer import Tokenizer, byte_alphabet

# Parts of tokenizer.json, as we write them: characters, and byte pairs.
CHARACTERS = {
    "normalizer": None,
    "pre_tokenizer": {
        "type": "Split",
        "pattern": {"Regex": r"[\s\S]"},   # every character, line ends too
        "behavior": "Isolated",
        "invert": False,
    },
    "post_processor": None,
    "decoder": {"type": "Fuse"},
}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
              "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
BYTE_PAIRS = {
    "normalizer": None,
    "pre_tokenizer": BYTE_LEVEL,
    "post_processor": BYTE_LEVEL | {"trim_offsets": False},
    "decoder": BYTE_LEVEL,
}


# --------------------------------------------------------------------------------------------------
# Reading

def read_tokenizer(folder, end=None):
    """
    The tokenizer_spec of a folder, None if it has no tokenizer.
    end      the id that ends a text, by the folder's config.json
    raises   InputError for a tokenizer that tokenizer.py would not copy exactly
    """
    folder = Path(folder)
    settings = read_json(folder / "tokenizer_config.json")
    data = read_json(folder / "tokenizer.json")
    vocab = read_json(folder / "vocab.json")
    try:
        if settings and settings.get("add_prefix_space"):
            raise ValueError("it puts a space before every text")
        if data is not None:
            return from_tokenizer_json(data, end)
        if vocab is not None:
            return from_vocab_and_merges(folder, vocab, settings or {}, end)
        if settings:
            raise ValueError("there is neither tokenizer.json nor vocab.json")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        raise InputError(
            f"{folder}: its tokenizer is none that can be used here: {first_line(e)}; without its "
            "files, tokenizer*.json and vocab.json, the weights alone can be loaded"
        ) from None
    return None


def from_tokenizer_json(data, end):
    """tokenizer.json -> spec; ValueError and the like for what has no spec"""
    model = data["model"]
    special = {}
    next_id = len(model["vocab"])
    for token in data.get("added_tokens") or []:
        text = token["content"]
        if not token["special"]:
            raise ValueError(f"{text!r} is cut out of texts before they are tokenized")
        special[text] = model["vocab"].get(text, next_id)   # as the tokenizers library decides
        next_id += text not in model["vocab"]
        if token["id"] != special[text]:
            raise ValueError(f"{text!r} has the id {token['id']}, and gets {special[text]}")
    if data.get("normalizer") is not None:
        raise ValueError("it changes the text (normalizer)")
    if model["type"] == "WordLevel":
        return characters(data, model["vocab"])
    if model["type"] != "BPE":
        raise ValueError(f"its model is {model['type']}")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback",
                "ignore_merges"):
        if model.get(key):
            raise ValueError(f"{key}={model[key]!r}")
    for key in ("post_processor", "decoder"):
        if (data.get(key) or BYTE_LEVEL)["type"] != "ByteLevel":
            raise ValueError(f"its {key} is {data[key]['type']}")
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    return byte_pairs(split_of(data["pre_tokenizer"]), model["vocab"], merges, special, end)


def split_of(pre_tokenizer):
    """The name in SPLITS that does the same"""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    name = "gpt2"
    if steps[0] == DIGITS:
        name = "starcoder"
        steps = steps[1:]
    if len(steps) != 1 or BYTE_LEVEL | steps[0] | {"trim_offsets": True} != BYTE_LEVEL:
        raise ValueError(f"it cuts texts by other rules (pre_tokenizer {pre_tokenizer!r:.100})")
    return name


def characters(data, vocab):
    chars = "".join(sorted(vocab, key=vocab.get))
    parts = {key: data.get(key) for key in CHARACTERS}
    if parts != CHARACTERS or vocab != {char: i for i, char in enumerate(chars)}:
        raise ValueError("its tokens are words, not characters")
    return {"kind": "char", "chars": chars}


def from_vocab_and_merges(folder, vocab, settings, end):
    """GPT-2's two files -> spec"""
    name = settings.get("tokenizer_class", "GPT2Tokenizer")
    if name.removesuffix("Fast") != "GPT2Tokenizer":
        raise ValueError(f"tokenizer_class={name}")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    merged = {"".join(pair) for pair in merges}
    special = {text: id for text, id in vocab.items() if len(text) > 1 and text not in merged}
    special |= read_json(folder / "added_tokens.json") or {}
    return byte_pairs("gpt2", vocab, merges, special, end)


def byte_pairs(split, vocab, merges, special, end):
    """A spec of kind "bpe", if tiktoken merges as merges, a list of pairs, says."""
    if end not in special.values():
        end = special.get("<|endoftext|>")
    vocab = {text: id for text, id in vocab.items() if text not in special}
    spec = {"kind": "bpe", "split": split, "vocab": vocab, "special": special, "end": end}
    if sorted([*vocab.values(), *special.values()]) != list(range(len(vocab) + len(special))):
        raise ValueError("its ids are not 0, 1, 2 and so on")
    if not vocab.keys() >= set(byte_alphabet().values()):
        raise ValueError("it has no tokens for some bytes")
    # tiktoken merges the pair whose sum has the lowest id; the tokenizers library follows the list
    # of merges. They agree on every text if they agree on how each token comes about.
    if list(map(list, merges)) != merges_of(Tokenizer(spec)):
        raise ValueError("its ids are not in the order of its merges")
    return spec


def merges_of(tokenizer):
    """The two parts that each token is merged from, as files spell them, in the order of the ids"""
    char = byte_alphabet()
    ranks = tokenizer.ranks()
    longer = sorted((token for token in ranks if len(token) > 1), key=ranks.get)
    return [["".join(char[b] for b in part) for part in halves(token, ranks)] for token in longer]


def halves(token, ranks):
    """Merge the bytes of a token in the order of the ranks until two parts are left."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        sums = [ranks.get(a + b, math.inf) for a, b in zip(parts, parts[1:], strict=False)]
        i = sums.index(min(sums))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


# --------------------------------------------------------------------------------------------------
# Writing

def write_tokenizer(folder, tokenizer, max_length):
    """Write the files that AutoTokenizer of transformers 4 and 5 reads."""
    settings = {
        # without the class, transformers 5 takes the one of the model_type, with ids of its own
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.bpe is None:
        vocab = {char: i for i, char in enumerate(tokenizer.chars)}
        # An unknown character is an error if unk_token is not in the vocabulary.
        model = {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"}
        data = CHARACTERS | {"added_tokens": [], "model": model}
    else:
        data = tokenizer_json_of_byte_pairs(tokenizer)
        if tokenizer.end is not None:
            end = tokenizer.token_bytes(tokenizer.end).decode()
            settings |= {"bos_token": end, "eos_token": end, "unk_token": end}   # as GPT-2's own
    data = {"version": "1.0", "truncation": None, "padding": None} | data
    write_json(Path(folder) / "tokenizer.json", data)
    write_json(Path(folder) / "tokenizer_config.json", settings)


def tokenizer_json_of_byte_pairs(tokenizer):
    char = byte_alphabet()
    vocab = {"".join(char[b] for b in token): id for token, id in tokenizer.ranks().items()}
    special = tokenizer.spec.get("special", {"<|endoftext|>": tokenizer.end})   # GPT-2's
    model = {"type": "BPE", "vocab": vocab | special, "merges": merges_of(tokenizer)}
    added = [
        {"id": id, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for text, id in special.items()
    ]
    data = BYTE_PAIRS | {"added_tokens": added, "model": model}
    if tokenizer.spec.get("split") == "starcoder":
        data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [DIGITS, BYTE_LEVEL]}
    return data
