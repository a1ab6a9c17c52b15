"""Text <-> token ids: byte pairs, GPT-2's or another model's, or single characters."""

import numpy as np
import requests
import tiktoken

from plumbing.downloads import DownloadError, reason
from plumbing.errors import InputError

# How text is split into pieces; byte pairs are merged within a piece. With StarCoder's rule every
# digit is a piece of its own.
SPLITS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "starcoder": r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+",
}


class Tokenizer:
    """
    spec is plain data, kept in meta.json and in every checkpoint. Its kinds:

      {"kind": "gpt2"}                         GPT-2's byte pairs, which tiktoken knows
      {"kind": "bpe",                          other byte pairs:
       "split": "gpt2",                        a name in SPLITS
       "vocab": {"Ġthe": 262, ...},            token, spelled in byte_alphabet(): id
       "special": {"<|endoftext|>": 50256},    special tokens, which encode() never returns
       "end": 50256}                           the special token that ends a text, or None
      {"kind": "char", "chars": "\\n !$&..."}   a character's id is its index in the string

    start   the id that begins a new text
    end     the id that ends a text, or None
    bpe     a tiktoken.Encoding, or None for characters

    Raises InputError for another spec.
    """

    def __init__(self, spec):
        kind = spec.get("kind") if isinstance(spec, dict) else None
        self.spec = spec
        self.bpe = self.end = None
        if kind == "gpt2":
            self.bpe = gpt2_bpe()
            self.end = self.bpe.eot_token   # <|endoftext|>, which separated documents in training
        elif kind == "bpe":
            self.bpe = other_bpe(spec)
            self.end = spec.get("end")
        elif kind == "char" and is_alphabet(spec.get("chars")):
            self.chars = spec["chars"]
            self.id_of = np.full(0x110000, -1, dtype=np.int32)   # code point -> id, -1 = unknown
            self.id_of[code_points(self.chars)] = np.arange(len(self.chars))
        else:
            raise InputError(
                f"unknown tokenizer {spec!r:.100}: expected kind 'gpt2', 'bpe' with its vocab, or "
                "'char' with its chars"
            )
        if self.bpe:
            self.vocab_size = self.bpe.n_vocab
            self.start = self.encode("\n")[0] if self.end is None else self.end
        else:
            self.vocab_size = len(self.chars)
            self.start = max(0, self.chars.find("\n"))

    def encode(self, text):
        """
        Text -> list of ids. Special tokens are not recognised: their names are encoded as ordinary
        text. Raises InputError for a character that has no id.
        """
        if self.bpe:
            return self.bpe.encode_ordinary(text)
        unknown = sorted(set(text) - set(self.chars))
        if unknown:
            listed = " ".join(repr(char) for char in unknown[:10])
            raise InputError(
                f"the tokenizer does not know the character(s) {listed}: the text it was made from "
                f"does not contain them; it knows {self.chars!r:.200}"
            )
        return self.id_of[code_points(text)].tolist()

    def token_bytes(self, token):
        """The UTF-8 bytes of one id. A byte-pair token may hold only a part of a character."""
        if self.bpe:
            return self.bpe.decode_single_token_bytes(token)
        return self.chars[token].encode()

    def decode(self, tokens):
        """Ids -> text; bytes that are not UTF-8 become U+FFFD."""
        raw = b"".join(self.token_bytes(token) for token in tokens)
        return raw.decode("utf-8", errors="replace")

    def ranks(self):
        """Byte pairs alone: {bytes of a token: id}, without special tokens"""
        return self.bpe._mergeable_ranks


def gpt2_bpe():
    """GPT-2's vocabulary, which tiktoken downloads once and keeps."""
    try:
        return tiktoken.get_encoding("gpt2")
    except (requests.RequestException, ValueError) as e:   # ValueError: wrong hash
        raise DownloadError(
            f"the GPT-2 tokenizer is not on this machine and {reason(e)}. tiktoken fetches "
            "vocab.bpe and encoder.json from openaipublic.blob.core.windows.net: run once on a "
            "machine with a network and TIKTOKEN_CACHE_DIR=<folder>, copy that folder here and "
            "set the same variable; config/stdlib.py needs none of this"
        ) from None


def other_bpe(spec):
    """A spec of kind "bpe" -> tiktoken.Encoding"""
    byte_of = {char: byte for byte, char in byte_alphabet().items()}
    try:
        ranks = {bytes(byte_of[c] for c in text): id for text, id in spec["vocab"].items()}
        special = spec["special"]
        # tiktoken checks none of this, and panics later
        if sorted([*ranks.values(), *special.values()]) != list(range(len(ranks) + len(special))):
            raise ValueError("its ids are not 0, 1, 2 and so on")
        if any(bytes([byte]) not in ranks for byte in range(256)):
            raise ValueError("it has no tokens for some bytes")
        if spec["end"] not in (None, *special.values()):
            raise ValueError(f"the end of a text, {spec['end']}, is not a special token")
        return tiktoken.Encoding("bpe", pat_str=SPLITS[spec["split"]], mergeable_ranks=ranks,
                                 special_tokens=special)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
        raise InputError(f"the tokenizer cannot be used: {e!r:.100}") from None


def is_alphabet(chars):
    """Whether chars gives each character one id"""
    return isinstance(chars, str) and len(chars) == len(set(chars))


def same_tokenizer(a, b):
    """Whether two specs give every text the same ids, and end it with the same one."""
    if a == b:
        return True
    if "char" in (a.get("kind"), b.get("kind")):
        return False
    a, b = Tokenizer(a), Tokenizer(b)
    split_a, split_b = (t.spec.get("split", "gpt2") for t in (a, b))
    return split_a == split_b and a.ranks() == b.ranks() and a.end == b.end


def byte_alphabet():
    """
    {byte: character}, as GPT-2's files spell bytes: printable ones as themselves, the others as the
    characters from U+0100 on, so that a space is Ġ.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def code_points(text):
    """The numbers of the characters in Unicode: (len(text),) uint32"""
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")
