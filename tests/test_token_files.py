"""Prepared data: in which order it is read, and what happens if it is not what it says."""

import json
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, fails

import train
from plumbing.token_files import Data


def numbered(n=1000, block_size=8, seed=3):
    """A dataset whose token i is the number i"""
    folder = Path("data/n")
    folder.mkdir(exist_ok=True)
    np.arange(n, dtype=np.uint16).tofile(folder / "train.bin")
    meta = {"dtype": "uint16", "vocab_size": n, "header_bytes": 0, "train": {"train.bin": n}}
    return Data(folder, meta, "train", block_size, seed)


def epoch(data, number):
    """x, y of all sequences of an epoch"""
    return data.batch(range(number * data.n, (number + 1) * data.n))


# ------------------------------------------------------------------------------------------------
# The order of data

def test_every_token_is_seen_once_per_epoch():
    data = numbered()
    assert data.n * 8 > 1000 - 2 * 8
    for number in range(3):
        x, y = epoch(data, number)
        assert torch.equal(y, (x + 1) % 1000)
        assert len(set(x.flatten().tolist())) == x.numel() == data.n * 8


def test_x_and_y_are_contiguous_so_that_pinned_copies_can_overlap():
    x, y = numbered().batch(range(4))
    assert x.is_contiguous() and y.is_contiguous()


def test_epochs_differ_in_order_and_in_where_windows_begin():
    data = numbered()
    first = epoch(data, 0)[0][:, 0]
    second = epoch(data, 1)[0][:, 0]
    assert not torch.equal(first, second)
    assert set((first % 8).tolist()) != set((second % 8).tolist())


def test_batch_is_a_function_of_seed_and_number_alone():
    data = numbered()
    in_order = torch.cat([data.batch(range(i, i + 4))[0] for i in range(0, 400, 4)])
    for part in (range(396, 398), range(398, 400), range(0, 2), range(124, 128)):
        assert torch.equal(numbered().batch(part)[0], in_order[part.start:part.stop])
    assert not torch.equal(numbered(seed=4).batch(range(4))[0], in_order[:4])


def test_memory_of_reading_is_flat_over_1000_steps():
    data = numbered(60_000)
    tracemalloc.start()
    for step in range(1000):
        data.batch(range(step * 32, step * 32 + 32))
        if step == 100:
            before = tracemalloc.get_traced_memory()[0]
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert after < before + 200_000   # windows that were kept would be 17 MB
    if sys.platform == "linux":   # nothing is mapped that could grow unseen
        assert "train.bin" not in Path("/proc/self/maps").read_text()


# ------------------------------------------------------------------------------------------------
# A dataset that is not what it says

META = Path("data/tiny/meta.json")
TRAIN = Path("data/tiny/train.bin")
VAL = Path("data/tiny/val.bin")


def refuses(match, *argv):
    fails(train, *TINY, *argv, match=match)
    assert not Path("out/ckpt.pt").exists()


def test_token_files_without_meta_json_say_that_it_is_missing():
    META.unlink()
    refuses("data/tiny has .bin files but no meta.json.*docs/your_own_data.md")
    TRAIN.unlink()
    VAL.unlink()
    refuses("unknown dataset 'tiny'")


@pytest.mark.parametrize("raw", [b"{", b"\xff", b"[]", b"{}"])
def test_meta_json_that_is_no_description_is_one_clear_line(raw):
    META.write_bytes(raw)
    refuses("meta.json is broken")


@pytest.mark.parametrize("change, match", [
    ({"tokenizer": {"kind": "words"}}, "unknown tokenizer"),
    ({"tokenizer": {"kind": "char"}}, "meta.json is broken"),
    ({"tokenizer": {"kind": "char", "chars": "abc"}}, "vocab_size=17.* tokenizer has 3"),
    ({"dtype": "float99"}, "meta.json is broken"),
    ({"train": [1]}, "meta.json is broken"),
])
def test_meta_json_that_contradicts_itself_is_one_clear_line(change, match):
    META.write_text(json.dumps(json.loads(META.read_text()) | change))
    refuses(match)


def test_missing_token_file_is_one_clear_line():
    TRAIN.unlink()
    refuses("train.bin is missing")


@pytest.mark.parametrize("path, size", [(TRAIN, 2001), (VAL, 4)])
def test_token_file_that_was_cut_is_one_clear_line(path, size):
    path.write_bytes(path.read_bytes()[:size])
    refuses(f"{path.name} has {size:,} bytes")


def test_id_past_the_vocabulary_is_one_clear_line():
    np.full(2448, 17, np.uint16).tofile(TRAIN)
    refuses("train.bin holds the id 17, .*16")


def test_text_shorter_than_one_block_is_one_clear_line():
    refuses("val split has 272 tokens.* block_size=300 needs 301", "--block_size=300")
    assert not Path("out").exists()
