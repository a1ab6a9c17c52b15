"""
The tokenizer's files of a Hugging Face folder: tokenizer.json, or vocab.json and merges.txt, which
are GPT-2's own. A tokenizer is refused unless tokenizer.py gives every text the same ids. (But for
the names of special tokens, which others cut out of texts.)
"""

import math
from pathlib import Path

from plumbing.errors import InputError
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
    raises   InputError for a tokenizer that tokenizer.py cannot reproduce exactly
    """
    folder = Path(folder)
    settings = read_json(folder / "tokenizer_config.json") or {}
    data = read_json(folder / "tokenizer.json")
    vocab = read_json(folder / "vocab.json")
    try:
        for key in ("add_prefix_space", "add_bos_token", "add_eos_token"):
            if settings.get(key):
                raise ValueError(f"tokenizer_config.json has {key}={settings[key]!r:.100}")
        if data is not None:
            return from_tokenizer_json(data, end)
        if vocab is not None:
            return from_vocab_and_merges(folder, vocab, settings, end)
        if settings:
            raise ValueError("there is neither tokenizer.json nor vocab.json")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        problem = str(e) if isinstance(e, (OSError, ValueError)) else repr(e)
        raise InputError(
            f"{folder}: its tokenizer cannot be used here: {problem:.200}; to load the weights "
            "alone, remove tokenizer*.json and vocab.json"
        ) from None
    return None


def from_tokenizer_json(data, end):
    """tokenizer.json -> spec. Raises ValueError and the like for what a spec cannot express."""
    model = data["model"]
    special = {}
    next_id = len(model["vocab"])
    for token in data.get("added_tokens") or []:
        text = token["content"]
        if not token["special"]:
            raise ValueError(f"{text!r} is an added token that is not special")
        special[text] = model["vocab"].get(text, next_id)   # as the tokenizers library decides
        next_id += text not in model["vocab"]
        if token["id"] != special[text]:
            raise ValueError(
                f"{text!r} has id {token['id']}, but the tokenizers library gives it id "
                f"{special[text]}"
            )
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
        if data.get(key) and data[key]["type"] != "ByteLevel":
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
        raise ValueError(f"it splits text by other rules (pre_tokenizer {pre_tokenizer!r:.100})")
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
    if (folder / "added_tokens.json").exists():
        raise ValueError("added_tokens.json does not say which of its tokens are special")
    return byte_pairs("gpt2", vocab, merges, special, end)


def byte_pairs(split, vocab, merges, special, end):
    """A spec of kind "bpe". ValueError unless tiktoken merges as merges, a list of pairs, says."""
    if type(end) is not int or end not in special.values():
        end = special.get("<|endoftext|>")
    vocab = {text: id for text, id in vocab.items() if text not in special}
    spec = {"kind": "bpe", "split": split, "vocab": vocab, "special": special, "end": end}
    # Of all neighbours, tiktoken merges those whose concatenation has the lowest id, the tokenizers
    # library the pair that comes first in its list. They agree on every text if both merge each
    # token from the same two parts, and the ids follow the order of the list.
    if list(map(list, merges)) != merges_of(Tokenizer(spec)):
        raise ValueError("its ids are not in the order of its merges")
    return spec


def merges_of(tokenizer):
    """As files list merges: for each token, in the order of the ids, the two parts it is made of"""
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
