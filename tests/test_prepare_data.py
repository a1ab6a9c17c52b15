"""prepare_data.py: text in, token files out."""

import hashlib
import random
import shutil
import sysconfig
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from helpers import LINES, SHAKESPEARE_TEXT, fails, ids, needs_shakespeare

import prepare_data
from plumbing.token_files import Data, load_meta
from plumbing.tokenizer import Tokenizer
from prepare_data import prepare, prepare_text


def decoded(split, folder, dtype=np.uint16):
    """The text of a split"""
    tokenizer = Tokenizer(load_meta(folder)["tokenizer"])
    return tokenizer.decode(ids(split, folder, dtype))


# ------------------------------------------------------------------------------------------------
# Any text

def test_characters_train_on_the_first_nine_tenths_and_come_back():
    text = LINES * 40
    n = int(0.9 * len(text))
    assert decoded("train", "data/tiny") == text[:n]
    assert decoded("val", "data/tiny") == text[n:]
    meta = load_meta("data/tiny")
    assert meta["vocab_size"] == len(set(text)) == 17
    assert meta["dtype"] == "uint16"
    assert meta["train"] == {"train.bin": n} and meta["val"] == {"val.bin": len(text) - n}
    assert meta["source_sha256"] == hashlib.sha256(text.encode()).hexdigest()


def test_vocabulary_is_that_of_the_training_split_and_the_rest_is_counted(capsys):
    Path("a.txt").write_text("abc" * 30 + "xyzzy" + "cba", encoding="utf-8")
    prepare_data.main(["--input", "a.txt", "--name", "letters"])
    assert "5 characters of the validation split" in capsys.readouterr().out
    assert load_meta("data/letters")["tokenizer"]["chars"] == "abc"
    assert decoded("val", "data/letters") == "bccba"


class Trickle:
    """A file that gives at most 7 bytes per read, so that reads end inside characters and words."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.file.close()

    def read(self, n):
        return self.file.read(7)

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.fixture
def trickling(monkeypatch):
    """The list of files that were opened to read bytes, each of them a Trickle"""
    opened = []
    real_open = open

    def open_trickling(path, mode="r", *args, **options):
        file = real_open(path, mode, *args, **options)
        if mode != "rb":
            return file
        opened.append(str(path))
        return Trickle(file)
    monkeypatch.setattr("builtins.open", open_trickling)
    return opened


def test_several_files_are_one_text_and_no_character_is_torn(trickling):
    raw = ("aé€😀\r\n" * 500).encode()
    Path("a.txt").write_bytes(raw[:6000])   # 500 times 12 bytes: files end after whole characters
    Path("b.txt").write_bytes(raw[6000:])
    prepare_text(Path("data/t"), ["a.txt", "b.txt"], "char")
    train_text = decoded("train", "data/t")
    assert train_text + decoded("val", "data/t") == raw.decode()
    assert abs(len(train_text.encode()) - 0.9 * len(raw)) < 4
    assert {"a.txt", "b.txt"} <= set(trickling)


def test_byte_pairs_made_piece_by_piece_are_those_of_the_whole_text(gpt2_tokenizer, trickling):
    words = [" ", "  ", "\n", "\n\n", "don't", "word", " 123", "é€", "😀", "...", "\t", "end "]
    rng = random.Random(0)
    text = "".join(rng.choice(words) for _ in range(4000)) + "last"
    Path("a.txt").write_text(text, encoding="utf-8", newline="")
    prepare_data.main(["--input", "a.txt", "--tokenizer", "gpt2", "--name", "bpe"])
    raw = text.encode()
    head = raw[:int(0.9 * len(raw))].decode(errors="ignore")
    gpt2 = tiktoken.get_encoding("gpt2")
    assert ids("train", "data/bpe") == gpt2.encode_ordinary(head)
    assert ids("val", "data/bpe") == gpt2.encode_ordinary(text[len(head):])
    assert "a.txt" in trickling


class ReadOnce(str):
    """What the last call left must not be searched again: a long word would take forever."""

    def __getitem__(self, i):
        assert i == slice(-1, None)
        return str(self)[i]


def test_text_is_cut_before_the_last_white_space_after_a_word():
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choices("ab \n\u00a0", k=rng.randrange(1, 9)))
        whole = max((i for i in range(1, len(text))
                     if text[i] in " \n" and not text[i - 1].isspace()), default=0)
        rest, pieces = "", []
        for character in text:
            piece, rest = prepare_data.cut_at_space(ReadOnce(rest), character)
            pieces.append(piece)
        assert ("".join(pieces), rest) == (text[:whole], text[whole:])


def test_ids_past_65535_get_32_bits():
    code_points = [*range(0x4000, 0x4000 + 30_000), *range(0x10000, 0x10000 + 40_000)]
    text = "".join(map(chr, code_points))
    Path("many.txt").write_text(text + text[-9:] * 3500, encoding="utf-8")
    prepare_text(Path("data/many"), ["many.txt"], "char")
    meta = load_meta("data/many")
    assert meta["vocab_size"] == 70_000 and meta["dtype"] == "uint32"
    assert decoded("train", "data/many", np.uint32)[:70_000] == text


def test_memory_does_not_grow_with_the_text():
    peaks = []
    for megabytes in (8, 32):
        with open("big.txt", "w", encoding="utf-8") as f:
            for _ in range(megabytes):
                f.write("to be or not to " * 65536)
        tracemalloc.start()
        prepare_text(Path("data/big"), ["big.txt"], "char")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 1_000_000


# ------------------------------------------------------------------------------------------------
# The datasets that are known by name

def test_stdlib_is_the_library_without_its_tests_and_needs_no_network(library):
    prepare("stdlib")
    meta = load_meta("data/stdlib")
    assert sum(meta["train"].values()) == 0.9 * 2 * 1200
    assert set(meta["tokenizer"]["chars"]) == set("x = 1\ny = 2\n")


def test_stdlib_without_a_library_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda *args, **options: {"stdlib": "nowhere"})
    fails(prepare_data, "stdlib", match="no Python files in nowhere")


@needs_shakespeare
def test_real_shakespeare_is_1003854_and_111540_tokens_of_65_characters():
    Path("data/shakespeare").mkdir()
    shutil.copy(SHAKESPEARE_TEXT, "data/shakespeare/input.txt")
    prepare_data.main(["shakespeare"])
    meta = load_meta("data/shakespeare")
    assert meta["train"] == {"train.bin": 1003854} and meta["val"] == {"val.bin": 111540}
    assert meta["vocab_size"] == 65


@needs_shakespeare
def test_real_shakespeare_in_byte_pairs_is_301966_and_36059_tokens(gpt2_tokenizer):
    Path("data/shakespeare").mkdir()
    shutil.copy(SHAKESPEARE_TEXT, "data/shakespeare/input.txt")   # one copy serves both datasets
    prepare("shakespeare_bpe")
    meta = load_meta("data/shakespeare_bpe")
    assert meta["train"] == {"train.bin": 301966} and meta["val"] == {"val.bin": 36059}
    assert meta["vocab_size"] == 50257


def write_shard(name, tokens):
    """data/fineweb/fineweb_<name>.bin, as it is published"""
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens)
    path = Path(f"data/fineweb/fineweb_{name}.bin")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())
    return path


def test_fineweb_shards_are_used_as_published(gpt2_tokenizer):
    write_shard("val_000000", range(50))
    write_shard("train_000001", range(100, 151))
    write_shard("train_000002", range(200, 252))
    prepare_data.main(["fineweb", "--shards", "2"])   # nothing is missing, nothing is fetched
    meta = load_meta("data/fineweb")
    assert meta["header_bytes"] == 1024
    assert meta["val"] == {"fineweb_val_000000.bin": 50}
    assert meta["train"] == {"fineweb_train_000001.bin": 51, "fineweb_train_000002.bin": 52}
    data = Data(Path("data/fineweb"), meta, "train", 10, seed=0)
    assert data.n == 10
    assert data.sequence(0).tolist() == list(range(100, 111))
    assert data.sequence(9).tolist() == list(range(240, 251))


@pytest.mark.parametrize("spoil", [
    pytest.param(lambda raw: raw[:-1], id="a byte too few"),
    pytest.param(lambda raw: raw + b"\0", id="a byte too many"),
    pytest.param(lambda raw: raw[:100], id="half a header"),
    pytest.param(lambda raw: b"\0" * 1024 + raw[1024:], id="an empty header"),
])
def test_broken_shard_is_refused(spoil):
    write_shard("train_000001", range(50))
    path = write_shard("val_000000", range(50))
    path.write_bytes(spoil(path.read_bytes()))
    fails(prepare_data, "fineweb", match="fineweb_val_000000.bin is not a whole token shard")


# ------------------------------------------------------------------------------------------------
# Mistakes

@pytest.mark.parametrize("argv, match", [
    (["shakespeer"], "unknown dataset 'shakespeer', did you mean 'shakespeare'"),
    (["fineweb", "--shards=0"], "shards=0: fineweb has 1 to 103"),
])
def test_unknown_dataset_is_one_clear_line(argv, match):
    fails(prepare_data, *argv, match=match)


@pytest.mark.parametrize("raw, match", [
    (b"", "a.txt.*empty"),
    (b"a", "too short to split"),
    ("caf\u00e9!".encode("latin1"), r"a.txt is not UTF-8 text \(byte 3\)"),
    ("a€".encode()[:-1], r"a.txt is not UTF-8 text \(byte 1\)"),
])
def test_bad_text_is_one_clear_line_and_leaves_no_dataset(raw, match):
    Path("a.txt").write_bytes(raw)
    fails(prepare_data, "--input", "a.txt", "--name", "x", match=match)
    assert not Path("data/x/meta.json").exists()
    assert not list(Path("data").glob("x/*.tmp"))


def test_missing_text_is_one_clear_line():
    argv = ["--input", "missing.txt", "--name", "x"]
    fails(prepare_data, *argv, match="missing.txt is not a file")
    assert not Path("data/x").exists()


@pytest.mark.parametrize("argv", [
    [],
    ["shakespeare", "--input", "text.txt"],
    ["--input", "text.txt"],
    ["stdlib", "--shards=x"],
])
def test_bad_usage_is_exit_status_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        prepare_data.main(argv)
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_free_disk_is_checked_first(monkeypatch):
    full = shutil._ntuple_diskusage(10**9, 10**9, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    needs = "tokenizing needs .* MB in data.x, .*0 MB"
    fails(prepare_data, "--input", "text.txt", "--name", "x", match=needs)
    fails(prepare_data, "fineweb", match="fineweb with 1 shard.* needs 400 MB")


def test_size_of_fineweb_is_said_before_it_is_fetched(monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    fails(prepare_data, "fineweb", "--shards=9", match="cannot fetch")
    assert "fineweb: 2.0 GB to download, 10 file(s)" in capsys.readouterr().out
