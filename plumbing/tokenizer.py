"""Text <-> token ids: GPT-2's byte pairs, or single characters."""

import numpy as np
import requests
import tiktoken

from plumbing.downloads import DownloadError, reason
from plumbing.errors import InputError


class Tokenizer:
    """
    spec is plain data, kept in meta.json and in every checkpoint: {"kind": "gpt2"}, or
    {"kind": "char", "chars": "\\n !$&..."}, where a character's id is its index in the string.

    start is the id that begins a new text. Raises InputError for another spec.
    """

    def __init__(self, spec):
        kind = spec.get("kind") if isinstance(spec, dict) else None
        if kind == "gpt2":
            self.bpe = gpt2_bpe()
            self.vocab_size = self.bpe.n_vocab
            self.start = self.bpe.eot_token   # <|endoftext|>, which separated documents in training
        elif kind == "char" and isinstance(spec.get("chars"), str):
            self.chars = spec["chars"]
            self.id_of = np.full(0x110000, -1, dtype=np.int32)   # code point -> id, -1 = unknown
            self.id_of[code_points(self.chars)] = np.arange(len(self.chars))
            self.vocab_size = len(self.chars)
            self.start = max(0, self.chars.find("\n"))
        else:
            raise InputError(
                f"unknown tokenizer {spec!r:.100}: expected kind 'gpt2', or 'char' with its chars"
            )
        self.spec = spec

    def encode(self, text):
        """Text -> list of ids. Raises InputError for a character that has no id."""
        if self.spec["kind"] == "gpt2":
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
        if self.spec["kind"] == "gpt2":
            return self.bpe.decode_single_token_bytes(token)
        return self.chars[token].encode()

    def decode(self, tokens):
        """Ids -> text; bytes that are not UTF-8 become U+FFFD."""
        raw = b"".join(self.token_bytes(token) for token in tokens)
        return raw.decode("utf-8", errors="replace")


def gpt2_bpe():
    """GPT-2's vocabulary, which tiktoken downloads once and keeps."""
    try:
        return tiktoken.get_encoding("gpt2")
    except (requests.RequestException, ValueError) as e:   # ValueError: of a wrong hash
        raise DownloadError(
            f"the GPT-2 tokenizer is not on this machine and {reason(e)}. tiktoken fetches "
            "vocab.bpe and encoder.json from openaipublic.blob.core.windows.net: run once on a "
            "machine with a network and TIKTOKEN_CACHE_DIR=<folder>, copy that folder here and "
            "set the same variable; config/stdlib.py needs none of this"
        ) from None


def code_points(text):
    """The numbers of the characters in Unicode: (len(text),) uint32"""
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")
