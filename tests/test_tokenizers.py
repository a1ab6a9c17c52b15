"""Tokenizers: characters, and the byte pairs of GPT-2."""

import pytest
import requests
import tiktoken
from helpers import fails

import prepare_data
from plumbing.tokenizer import Tokenizer

TEXTS = ["", "Hello world", "naïve café 😀\n\ttab", " leading", "日本語"]


@pytest.mark.parametrize("text", TEXTS)
def test_characters_give_back_the_text(text):
    tokenizer = Tokenizer({"kind": "char", "chars": "".join(sorted(set(text)))})
    assert tokenizer.vocab_size == len(set(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_byte_pairs_give_back_the_text(text, gpt2_tokenizer):
    assert gpt2_tokenizer.decode(gpt2_tokenizer.encode(text)) == text


def test_without_tokenizer_and_network_the_error_says_what_to_copy(monkeypatch):
    def no_network(name):
        raise requests.ConnectionError
    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    argv = ["--input", "text.txt", "--tokenizer=gpt2", "--name", "x"]
    fails(prepare_data, *argv, match="TIKTOKEN_CACHE_DIR")
