"""
The specification of prepare_data.py, train.py and sample.py: data, configuration, training, faults.
Every kind of bad input ends in one clear line, exit status not 0, no traceback, and nothing on disk harmed.
"""

import csv
import functools
import hashlib
import http.server
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import requests
import tiktoken
import torch
from torch.nn import functional as F

import launch
import prepare_data
import sample
import train
from model import GPT, GPTConfig, InputError
from prepare_data import Data, Tokenizer, download, load_meta, prepare, prepare_text
from train import TrainConfig, load_config

HERE = Path(__file__).parent.resolve()
SHAKESPEARE = HERE / "data" / "shakespeare" / "input.txt"
torch.set_num_threads(1)   # the models here are so small that a second thread only makes them slower
TINY = ["--dataset=tiny", "--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=8", "--batch_size=4", "--eval_iters=3",
        "--max_iters=12", "--warmup_iters=2", "--learning_rate=1e-2", "--eval_interval=6", "--log_interval=3", "--device=cpu",
        "--dtype=float32", "--compile=False"]
LINES = "the cat sat on the mat.\nthe dog sat on the log.\nwho sat on the cat?\n"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, with a small prepared dataset and no proxy between it and its server."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "*")
    Path("text.txt").write_text(LINES * 40, encoding="utf-8", newline="")
    prepare_text(Path("data/tiny"), ["text.txt"], "char")
    return tmp_path


@pytest.fixture
def gpt2_tokenizer():
    try:
        return Tokenizer({"kind": "gpt2"})
    except InputError:
        pytest.skip("the GPT-2 tokenizer is not on this machine and there is no network (set TIKTOKEN_CACHE_DIR)")


def fails(script, *argv, match):
    """Run a script's main as its command line does; it must end in one line on stderr, which is returned."""
    sys.argv = [script.__name__, *map(str, argv)]
    err = io.StringIO()
    err.reconfigure = lambda **k: None
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as e:
        patch.setattr(sys, "stderr", err)
        launch.run(script.main)
    line = err.getvalue().rstrip("\n").splitlines()[-1]
    assert e.value.code == 1 and "Traceback" not in err.getvalue() and re.search(match, line), err.getvalue()
    return line


def checkpoint(path="out/ckpt.pt"):
    return torch.load(path, weights_only=True)


def same_weights(a, b):
    return all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"]) and a["model"].keys() == b["model"].keys()


def rows(path="out/metrics.csv"):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


# ----------------------------------------------------------------------------------------------------------------------
# Configuration

def test_defaults_are_GPT2_124M_on_fineweb_and_config_gpt2_says_the_same():
    assert load_config([]) == (TrainConfig(), GPTConfig())
    assert load_config([str(HERE / "config/gpt2.py")]) == load_config([])


@pytest.mark.parametrize("file", sorted(p.name for p in (HERE / "config").glob("*.py")))
def test_every_config_file_is_valid(file):
    load_config([str(HERE / "config" / file)])


@pytest.mark.parametrize("argv", [["--learning_rate=1", "--eval_only", "--n_layer", "3", "--out_dir=a=b", "--seed", "7"],
                                  ["--seed=7", "--eval_only=true", "--learning_rate", "1.0", "--out_dir", "a=b", "--n_layer=3"]])
def test_flags_in_every_form(argv):
    c, gpt_config = load_config(argv)
    assert (c.learning_rate, c.eval_only, gpt_config.n_layer, c.out_dir, c.seed) == (1.0, True, 3, "a=b", 7)
    assert type(c.learning_rate) is float   # an int is a fine float


def test_later_files_win_over_earlier_and_flags_over_files():
    Path("a.py").write_text("import math\ndef helper(): pass\n_private = 1\nn_layer = 5\nn_head = 4\nmax_iters = 10")
    Path("b.py").write_text("n_layer = 6\nn_embd = 64\nmax_iters = 20")
    c, gpt_config = load_config(["--max_iters=30", "a.py", "b.py"])
    assert (gpt_config.n_layer, gpt_config.n_head, gpt_config.n_embd, c.max_iters) == (6, 4, 64, 30)


def test_config_file_of_a_windows_editor():
    Path("a.py").write_text("n_layer = 5", encoding="utf-8-sig")
    assert load_config(["a.py"])[1].n_layer == 5


def test_bare_flag_before_a_file_does_not_swallow_it():
    Path("a.py").write_text("n_layer = 5")
    c, gpt_config = load_config(["--eval_only", "a.py"])
    assert c.eval_only and gpt_config.n_layer == 5


def test_optional_settings_take_none():
    assert load_config(["--compile=none"])[0].compile is None
    assert load_config(["--compile"])[0].compile is True
    assert load_config(["--min_lr=0"])[0].min_lr == 0.0


@pytest.mark.parametrize("text, value", [("8", 8), ("8,0", (8, 0)), ("(8, 0)", (8, 0)), ("[8, 0]", (8, 0))])
def test_window_is_one_number_or_one_a_layer(text, value):
    assert load_config(["--n_layer=2", "--use_swa", f"--window_size={text}"])[1].window_size == value


@pytest.mark.parametrize("base", ["shakespeare.py", "stdlib.py", "gpt2.py"])
def test_overlays_compose_with_every_config(base):
    plain = load_config([str(HERE / "config" / base)])[1]
    switches = [tuple(getattr(load_config([str(HERE / "config" / f) for f in (base, overlay)])[1], s) for s in ("use_rope", "use_gqa", "use_swa"))
                for overlay in ("rope.py", "gqa.py", "swa.py", "modern.py")]
    assert switches == [(True, False, False), (False, True, False), (False, False, True), (True, True, True)]
    assert load_config([str(HERE / "config" / f) for f in (base, "modern.py")])[1].n_embd == plain.n_embd


def test_text_settings_stay_text():
    assert load_config(["--dataset=123"])[0].dataset == "123"


def test_help_lists_every_setting_with_default_and_comment(capsys):
    with pytest.raises(SystemExit) as e:
        load_config(["--help"])
    out = capsys.readouterr().out
    assert not e.value.code
    for name in (*TrainConfig.__dataclass_fields__, *GPTConfig.__dataclass_fields__):
        line = next(line for line in out.splitlines() if f" --{name}=" in line)
        assert len(line.split(maxsplit=1)[1]) > 10, f"{name} has no comment"


@pytest.mark.parametrize("argv, match", [
    (["--learning_rat=1"], "learning_rat is not a setting, did you mean learning_rate"),
    (["--zzz=1"], "zzz is not a setting"),
    (["typo.py"], "typo.py: learning_rate_ is not a setting, did you mean learning_rate"),
    (["--n_layer=four"], "n_layer='four' is of type str, must be int"),
    (["--n_layer=4.0"], "n_layer=4.0 is of type float, must be int"),
    (["--n_layer=True"], "n_layer=True is of type bool, must be int"),
    (["--n_layer"], "--n_layer needs a value"),
    (["--out_dir", "--eval_only"], "--out_dir needs a value"),
    (["--out_dir="], "out_dir='', dataset='fineweb': neither may be empty"),
    (["exits.py"], "exits.py, line 2: SystemExit"),
    (["lines.py"], "lines.py, line 1: ValueError: one$"),
    ([*TINY, "--n_embd=4000000"], "not enough memory"),
    ([*TINY, "--device=hpu"], "device=hpu: must be auto"),
    (["--eval_only=1"], "eval_only=1 is of type int, must be bool"),
    (["--min_lr=low"], "min_lr='low' is of type str, must be float or None"),
    (["type.py"], "type.py: out_dir=7 is of type int, must be str"),
    (["missing.py"], "cannot read the config file missing.py: No such file"),
    (["."], "cannot read the config file ."),
    (["latin.py"], "cannot read the config file latin.py: not UTF-8"),
    (["raises.py"], "raises.py, line 2: ZeroDivisionError: division by zero"),
    (["syntax.py"], "syntax.py, line 2: SyntaxError"),
    (["--n_embd=100", "--n_head=3"], "n_embd=100 is not divisible by n_head=3"),
    (["--batch_size=0"], "batch_size=0: must be at least 1"),
    (["--learning_rate=-1"], "learning_rate=-1.0: must be at least 0"),
    (["--dtype=float16"], "dtype='float16': must be auto or float32 or bfloat16"),
    (["--beta2=1"], "beta2=1.0"),
    ([*TINY, "--batch_size=6", "--micro_batch_size=4"], "batch_size=6 cannot be shared by 1 process.es. in parts of 4 sequences"),
    ([*TINY, "--device=tpu9"], "device=tpu9"),
    ([*TINY, "--device=meta"], "device=meta: must be auto"),
    (["--seed=99999999999999999999"], "seed=99999999999999999999: must be at least 0 and less than"),
    (["--min_lr=-1"], "min_lr=-1.0: must be at least 0 and at most learning_rate"),
    (["--n_layer={[]:1}"], "n_layer=.* is of type str, must be int"),
    (["library.py"], "library.py, line 2: JSONDecodeError"),
    ([*TINY, "--vocab_size=5"], "vocab_size=5 is less than the 17 ids")])
def test_bad_configuration_is_one_clear_line(argv, match):
    Path("typo.py").write_text("learning_rate_ = 1")
    Path("type.py").write_text("out_dir = 7")
    Path("latin.py").write_bytes("out_dir = 'é'".encode("latin1"))
    Path("raises.py").write_text("n_layer = 1\nn_head = 1 / 0")
    Path("exits.py").write_text("import sys\nsys.exit()")
    Path("lines.py").write_text("raise ValueError('one\\ntwo')")
    Path("library.py").write_text("import json\nn_layer = json.loads('{')")
    Path("syntax.py").write_text("n_layer = 1\nn_head = = 2")
    fails(train, *argv, match=match)
    assert not Path("out").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Preparing data

def ids(split, folder="data/tiny", dtype=np.uint16):
    return np.fromfile(Path(folder) / f"{split}.bin", dtype=dtype).tolist()


def test_characters_train_on_the_first_nine_tenths_and_come_back():
    meta, text = load_meta("data/tiny"), LINES * 40
    tokenizer, n = Tokenizer(meta["tokenizer"]), int(0.9 * len(text))
    assert tokenizer.decode(ids("train")) == text[:n] and tokenizer.decode(ids("val")) == text[n:]
    assert meta["vocab_size"] == len(set(text)) == tokenizer.vocab_size and meta["dtype"] == "uint16"
    assert meta["train"] == {"train.bin": n} and meta["source_sha256"] == hashlib.sha256(text.encode()).hexdigest()


def test_vocabulary_is_of_the_training_split_and_the_rest_is_counted(capsys):
    Path("a.txt").write_text("abc" * 30 + "xyzzy" + "cba", encoding="utf-8")
    prepare_data.main(["--input", "a.txt", "--name", "letters"])
    assert "5 characters of the validation split do not occur in the training split" in capsys.readouterr().out
    assert load_meta("data/letters")["tokenizer"]["chars"] == "abc" and Tokenizer({"kind": "char", "chars": "abc"}).decode(ids("val", "data/letters")) == "bccba"


def test_several_files_are_one_text_and_characters_of_many_bytes_are_never_torn(monkeypatch):
    text = "aé€😀\r\n" * 500
    raw = text.encode()
    Path("a.txt").write_bytes(raw[:6000])   # a boundary between files stands between characters, one between reads need not
    Path("b.txt").write_bytes(raw[6000:])
    assert raw[:6000].decode()
    real = open
    monkeypatch.setattr("builtins.open", lambda path, mode="r", *a, **k: Trickle(real(path, mode)) if mode == "rb" else real(path, mode, *a, **k))
    prepare_text(Path("data/t"), ["a.txt", "b.txt"], "char")
    tokenizer = Tokenizer(load_meta("data/t")["tokenizer"])
    train_text = tokenizer.decode(ids("train", "data/t"))
    assert train_text + tokenizer.decode(ids("val", "data/t")) == text
    assert abs(len(train_text.encode()) - 0.9 * len(raw)) < 4


class Trickle:
    """A file that gives 7 bytes at a time."""
    def __init__(self, f):
        self.f = f

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.f.close()

    def read(self, n):
        return self.f.read(7)

    def __getattr__(self, name):
        return getattr(self.f, name)


def test_piecewise_byte_pairs_are_those_of_the_whole_text(monkeypatch, gpt2_tokenizer):
    rng = random.Random(0)
    text = "".join(rng.choice([" ", "  ", "\n", "\n\n", "don't", "word", " 123", "é€", "😀", "...", "\t", "end "]) for _ in range(4000)) + "last"
    Path("a.txt").write_text(text, encoding="utf-8", newline="")
    real = open
    monkeypatch.setattr("builtins.open", lambda path, mode="r", *a, **k: Trickle(real(path, mode)) if mode == "rb" else real(path, mode, *a, **k))
    prepare_data.main(["--input", "a.txt", "--tokenizer", "gpt2", "--name", "bpe"])
    raw = text.encode()
    head = raw[:int(0.9 * len(raw))].decode(errors="ignore")
    expected = tiktoken.get_encoding("gpt2")
    assert ids("train", "data/bpe") == expected.encode_ordinary(head)
    assert ids("val", "data/bpe") == expected.encode_ordinary(text[len(head):])


def test_ids_past_65535_get_32_bits(monkeypatch):
    text = "".join(chr(i) for i in range(0x4000, 0x4000 + 30_000)) + "".join(chr(i) for i in range(0x10000, 0x10000 + 40_000))
    Path("many.txt").write_text(text + text[-9:] * 3500, encoding="utf-8")
    prepare_text(Path("data/many"), ["many.txt"], "char")
    meta = load_meta("data/many")
    assert meta["vocab_size"] > 65536 and meta["dtype"] == "uint32"
    assert Tokenizer(meta["tokenizer"]).decode(ids("train", "data/many", np.uint32)[:70_000]) == text


def test_memory_does_not_grow_with_the_text():
    peaks = []
    for megabytes in (8, 32):
        with open("big.txt", "w", encoding="utf-8") as f:
            for _ in range(megabytes):
                f.write("to be or not to be, "[:16] * 65536)
        tracemalloc.start()
        prepare_text(Path("data/big"), ["big.txt"], "char")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 1_000_000


def test_stdlib_needs_no_network(monkeypatch):
    root = Path("lib")
    for name, text in {"a.py": "x = 1\n" * 200, "sub/b.py": "y = 2\n" * 200, "test/c.py": "tested", "d.py": "é" * 99, "e.txt": "no"}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8", newline="")
    monkeypatch.setattr(prepare_data.sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    prepare("stdlib")
    assert sum(load_meta("data/stdlib")["train"].values()) == 2160 and "é" not in load_meta("data/stdlib")["tokenizer"]["chars"]
    monkeypatch.setattr(prepare_data.sysconfig, "get_paths", lambda: {"stdlib": "nowhere"})
    fails(prepare_data, "stdlib", match="no Python files in nowhere")


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="data/shakespeare/input.txt is not here")
def test_real_shakespeare_is_1003854_and_111540_tokens_of_65_characters(capsys):
    Path("data/shakespeare").mkdir()
    shutil.copy(SHAKESPEARE, "data/shakespeare/input.txt")
    prepare_data.main(["shakespeare"])
    meta = load_meta("data/shakespeare")
    assert (meta["train"], meta["val"], meta["vocab_size"]) == ({"train.bin": 1003854}, {"val.bin": 111540}, 65)


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="data/shakespeare/input.txt is not here")
def test_real_shakespeare_in_byte_pairs_is_301966_and_36059_tokens(gpt2_tokenizer):
    Path("data/shakespeare").mkdir()
    shutil.copy(SHAKESPEARE, "data/shakespeare/input.txt")   # found there: one copy serves both datasets
    prepare("shakespeare_bpe")
    meta = load_meta("data/shakespeare_bpe")
    assert (meta["train"], meta["val"], meta["vocab_size"]) == ({"train.bin": 301966}, {"val.bin": 36059}, 50257)


def shard(path, tokens):
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())


def test_fineweb_shards_with_their_header(gpt2_tokenizer):
    for i, name in enumerate(["val_000000", "train_000001", "train_000002"]):
        shard(f"data/fineweb/fineweb_{name}.bin", np.arange(100 * i, 100 * i + 50 + i))
    prepare_data.main(["fineweb", "--shards", "2"])   # files that lie there are used
    meta = load_meta("data/fineweb")
    assert meta["train"] == {"fineweb_train_000001.bin": 51, "fineweb_train_000002.bin": 52} and meta["header_bytes"] == 1024
    data = Data(Path("data/fineweb"), meta, "train", 10, seed=0)
    assert data.n == 10 and data.window(0).tolist() == list(range(100, 111)) and data.window(9).tolist() == list(range(240, 251))


@pytest.mark.parametrize("spoil", [lambda raw: raw[:-1], lambda raw: raw + b"\0", lambda raw: raw[:100], lambda raw: b"\0" * 1024 + raw[1024:]])
def test_broken_shard_is_refused(spoil):
    for name in ("val_000000", "train_000001"):
        shard(f"data/fineweb/fineweb_{name}.bin", np.arange(50))
    path = Path("data/fineweb/fineweb_val_000000.bin")
    path.write_bytes(spoil(path.read_bytes()))
    fails(prepare_data, "fineweb", match="fineweb_val_000000.bin is not a whole token shard")


@pytest.mark.parametrize("argv, match", [
    (["shakespeer"], "unknown dataset 'shakespeer', did you mean 'shakespeare'"),
    (["fineweb", "--shards=0"], "--shards=0: fineweb has 1 to 103"),
    (["--input", "empty.txt", "--name", "x"], "empty.txt: empty text"),
    (["--input", "one.txt", "--name", "x"], "this text is too short to split"),
    (["--input", "missing.txt", "--name", "x"], "missing.txt is not a file"),
    (["--input", "latin.txt", "--name", "x"], r"latin.txt is not UTF-8 text \(byte 3\)"),
    (["--input", "cut.txt", "--name", "x"], r"cut.txt is not UTF-8 text \(byte 1\)")])
def test_bad_text_is_one_clear_line_and_leaves_no_dataset(argv, match):
    Path("empty.txt").write_text("")
    Path("one.txt").write_text("a")
    Path("latin.txt").write_bytes("caf\u00e9!".encode("latin1"))
    Path("cut.txt").write_bytes("a€".encode()[:-1])
    fails(prepare_data, *argv, match=match)
    assert not Path("data/x/meta.json").exists() and not list(Path("data").glob("x/*.tmp"))


@pytest.mark.parametrize("argv", [[], ["shakespeare", "--input", "text.txt"], ["--input", "text.txt"], ["stdlib", "--shards=x"]])
def test_bad_usage_is_exit_status_2(argv, capsys):
    with pytest.raises(SystemExit) as e:
        prepare_data.main(argv)
    assert e.value.code == 2 and "error:" in capsys.readouterr().err


def test_disk_is_checked_first(monkeypatch):
    monkeypatch.setattr(prepare_data.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    fails(prepare_data, "--input", "text.txt", "--name", "x", match="tokenizing needs .* MB in data.x, 0 MB are free")
    fails(prepare_data, "fineweb", match="fineweb with 1 shard.* needs 400 MB")


def test_no_tokenizer_and_no_network_says_what_to_copy(monkeypatch):
    def no_network(name):
        raise requests.ConnectionError
    monkeypatch.setattr(prepare_data.tiktoken, "get_encoding", no_network)
    fails(prepare_data, "--input", "text.txt", "--tokenizer=gpt2", "--name", "x", match="TIKTOKEN_CACHE_DIR")


# ----------------------------------------------------------------------------------------------------------------------
# Downloads, from a server of our own

class Server(http.server.BaseHTTPRequestHandler):
    files, fault, asked = {}, None, []

    def do_GET(self):
        self.asked.append((self.path, self.headers.get("Range"), self.headers.get("Authorization")))
        body = self.files.get(self.path)
        if body is None or self.fault == "500":
            return self.send_error(404 if body is None else 500)
        if self.path.startswith("/hub/"):   # large files of the Hub: the hash comes with a redirect to where the bytes are
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/hub"))
            self.send_header("X-Linked-Etag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("Content-Length", "0")
            return self.end_headers()
        start = int(self.headers["Range"][6:-1]) if self.headers.get("Range") and self.fault != "no ranges" else 0
        if start >= len(body):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start:start + 300_000] if self.fault == "cut" else body[start:])
        self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    Server.files, Server.fault, Server.asked = {"/f": bytes(range(256)) * 4000}, None, []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def digest(path):
    return hashlib.sha256(Server.files[path]).hexdigest()


def test_download_arrives_whole_and_verified(server):
    download(f"{server}/f", "new/folder/f", digest("/f"))
    assert Path("new/folder/f").read_bytes() == Server.files["/f"] and len(list(Path("new/folder").iterdir())) == 1


def test_download_that_breaks_goes_on_where_it_stopped(server):
    Server.fault = "cut"
    with pytest.raises(InputError, match="run the same command again"):
        download(f"{server}/f", "f", digest("/f"))
    assert not Path("f").exists() and Path("f.part").stat().st_size >= 300_000 - 65536
    Server.fault = None
    download(f"{server}/f", "f", digest("/f"))
    assert Path("f").read_bytes() == Server.files["/f"] and Server.asked[-1][1].startswith("bytes=") and not Path("f.part").exists()


@pytest.mark.parametrize("fault", ["no ranges", None])
@pytest.mark.parametrize("part", [b"", b"stale" * 300_000])
def test_server_without_ranges_or_a_part_that_is_too_long_starts_again(server, fault, part):
    Server.fault = fault
    Path("f.part").write_bytes(part)
    download(f"{server}/f", "f", digest("/f"))
    assert Path("f").read_bytes() == Server.files["/f"]


def test_wrong_hash_is_refused_and_the_next_try_starts_anew(server):
    Path("f").write_text("what was there")
    with pytest.raises(InputError, match="wrong sha256"):
        download(f"{server}/f", "f", "0" * 64)
    assert Path("f").read_text() == "what was there" and not Path("f.part").exists()


def test_hash_of_the_hub_is_checked(server):
    Server.files["/hub/f"] = b"another file"
    with pytest.raises(InputError, match="wrong sha256"):
        download(f"{server}/hub/f", "f")
    Server.files["/hub/f"] = Server.files["/f"]
    download(f"{server}/hub/f", "f")
    assert Path("f").read_bytes() == Server.files["/f"]


@pytest.mark.parametrize("fault, path, match", [("500", "/f", "answered 500"), (None, "/missing", "answered 404")])
def test_http_error_is_one_clear_line(server, fault, path, match):
    Server.fault = fault
    with pytest.raises(InputError, match=match):
        download(server + path, "f")
    assert not list(Path().glob("f*"))


def test_no_network_names_address_file_and_what_works_without(monkeypatch):
    monkeypatch.setitem(prepare_data.SHAKESPEARE, "url", "http://127.0.0.1:9/input.txt")
    line = fails(train, "--dataset=shakespeare", match="no connection could be made")
    assert "http://127.0.0.1:9/input.txt" in line and str(Path("data/shakespeare/input.txt")) in line and "stdlib" in line


def test_shakespeare_is_downloaded_and_a_file_that_lies_there_is_verified(server, monkeypatch):
    Server.files["/input.txt"] = (LINES * 99).encode()
    monkeypatch.setitem(prepare_data.SHAKESPEARE, "url", f"{server}/input.txt")
    monkeypatch.setitem(prepare_data.SHAKESPEARE, "sha256", digest("/input.txt"))
    prepare("shakespeare")
    shutil.rmtree("data/shakespeare")
    Path("data/shakespeare").mkdir()
    Path("data/shakespeare/input.txt").write_bytes(Server.files["/input.txt"])
    asked = len(Server.asked)
    prepare("shakespeare")
    assert len(Server.asked) == asked
    Path("data/shakespeare/input.txt").write_text("not Shakespeare")
    fails(prepare_data, "shakespeare", match="wrong sha256")
    assert Path("data/shakespeare/input.txt").read_text() == "not Shakespeare"


def test_released_weights_come_from_HF_ENDPOINT_once(server, monkeypatch):
    GPT(GPTConfig(8, 17, 1, 2, 16)).save_pretrained("made")
    for file in ("config.json", "model.safetensors"):
        Server.files[f"/openai-community/gpt2/resolve/main/{file}"] = Path("made", file).read_bytes()
    monkeypatch.setenv("HF_ENDPOINT", f"{server}/")
    monkeypatch.setenv("HF_TOKEN", "secret")
    Path("gpt2").mkdir()   # an empty folder is in nobody's way
    GPT.from_pretrained("gpt2")
    assert len(Server.asked) == 2 and Server.asked[0][2] == "Bearer secret"
    assert GPT.from_pretrained("gpt2").config.n_embd == 16 and len(Server.asked) == 2
    assert sorted(p.name for p in Path("checkpoints/gpt2").iterdir()) == ["config.json", "model.safetensors"]
    download(f"{server.replace('127.0.0.1', 'localhost')}/f", "f")
    assert Server.asked[-1][2] is None   # the token is for the Hub alone


# ----------------------------------------------------------------------------------------------------------------------
# The order of data

def numbered(n=1000, block_size=8, seed=3):
    """A dataset whose token i is the number i."""
    Path("data/n").mkdir(exist_ok=True)
    np.arange(n, dtype=np.uint16).tofile("data/n/train.bin")
    meta = dict(dtype="uint16", vocab_size=n, header_bytes=0, train={"train.bin": n})
    return Data(Path("data/n"), meta, "train", block_size, seed)


def test_every_token_is_seen_once_an_epoch():
    data = numbered()
    for epoch in range(3):
        x, y = data.batch(range(epoch * data.n, (epoch + 1) * data.n))
        assert torch.equal(y, (x + 1) % 1000) and x.is_contiguous() and y.is_contiguous()   # as a pinned copy must be
        assert len(set(x.flatten().tolist())) == x.numel() == data.n * 8 > 1000 - 2 * 8


def test_epochs_differ_in_order_and_in_where_windows_begin():
    data = numbered()
    first, second = (data.batch(range(e * data.n, (e + 1) * data.n))[0][:, 0] for e in range(2))
    assert not torch.equal(first, second) and set((first % 8).tolist()) != set((second % 8).tolist())


def test_batch_is_a_function_of_seed_and_number_alone():
    data = numbered()
    later = [data.batch(range(i, i + 4)) for i in range(0, 400, 4)]
    for i in (396, 0, 124):   # in any order, in any process, split in any way
        for part in (range(i, i + 2), range(i + 2, i + 4)):
            assert torch.equal(numbered().batch(part)[0], later[i // 4][0][part.start - i:part.stop - i])
    assert not torch.equal(numbered(seed=4).batch(range(4))[0], later[0][0])


def test_memory_of_reading_is_flat_over_1000_steps():
    data = numbered(60_000)
    tracemalloc.start()
    for step in range(1000):
        data.batch(range(step * 32, step * 32 + 32))
        if step == 100:
            before = tracemalloc.get_traced_memory()[0]
    assert tracemalloc.get_traced_memory()[0] < before + 200_000   # windows kept would be 17 MB
    tracemalloc.stop()
    if sys.platform == "linux":
        assert "train.bin" not in Path("/proc/self/maps").read_text()   # nothing mapped that could grow unseen


# ----------------------------------------------------------------------------------------------------------------------
# A dataset that is not what it says

def edit_meta(**changes):
    path = Path("data/tiny/meta.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(path, n):
    Path(path).write_bytes(Path(path).read_bytes()[:n])


@pytest.mark.parametrize("spoil, match", [
    (lambda: Path("data/tiny/meta.json").unlink(), "unknown dataset 'tiny'"),
    (lambda: Path("data/tiny/meta.json").write_text("{"), "meta.json is broken"),
    (lambda: Path("data/tiny/meta.json").write_bytes(b"\xff"), "meta.json is broken"),
    (lambda: Path("data/tiny/meta.json").write_text("[]"), "meta.json is broken"),
    (lambda: Path("data/tiny/meta.json").write_text("{}"), "meta.json is broken"),
    (lambda: edit_meta(tokenizer={"kind": "words"}), "unknown tokenizer"),
    (lambda: edit_meta(tokenizer={"kind": "char"}), "meta.json is broken"),
    (lambda: edit_meta(tokenizer={"kind": "char", "chars": "abc"}), "vocab_size=17, but its tokenizer has 3"),
    (lambda: edit_meta(dtype="float99"), "meta.json is broken"),
    (lambda: edit_meta(train=[1]), "meta.json is broken"),
    (lambda: Path("data/tiny/train.bin").unlink(), "train.bin is missing"),
    (lambda: truncate("data/tiny/train.bin", 2001), "train.bin has 2,001 bytes"),
    (lambda: truncate("data/tiny/val.bin", 4), "val.bin has 4 bytes"),
    (lambda: np.full(2448, 17, np.uint16).tofile("data/tiny/train.bin"), "train.bin holds the id 17, its vocabulary ends at 16")])
def test_broken_dataset_is_one_clear_line(spoil, match):
    spoil()
    fails(train, *TINY, match=match)
    assert not Path("out/ckpt.pt").exists()


def test_text_shorter_than_one_block():
    fails(train, *TINY, "--block_size=300", match="val split has 272 tokens, and one sequence of block_size=300 needs 301")
    assert not Path("out").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Training

def test_run_leaves_checkpoints_metrics_a_curve_a_sample_and_the_next_command(capsys):
    train.main(TINY)
    out = capsys.readouterr().out
    assert out.startswith("device: cpu (as asked), float32 (as asked)")
    for text in ("batch: 4 sequences = 1 accumulation step(s) x 4 x 1 process; 32 tokens a step", "step 3/12 | loss", "tokens/s",
                 "step 12: validation loss", "█", "python sample.py --out_dir=out"):
        assert text in out
    assert sorted(p.name for p in Path("out").iterdir()) == ["best.pt", "ckpt.pt", "metrics.csv"]
    table = rows()
    assert list(table[0]) == "step,tokens,train_loss,val_loss,lr,grad_norm,tokens_per_s,elapsed_s".split(",")
    assert [(r["step"], bool(r["val_loss"])) for r in table] == [("0", True), ("3", False), ("6", False), ("6", True), ("9", False), ("12", False), ("12", True)]
    assert float(table[-1]["val_loss"]) < float(table[0]["val_loss"])


def test_checkpoint_holds_plain_names_and_all_that_sampling_needs():
    train.main(TINY)
    saved = checkpoint()
    assert saved.keys() == {"model", "optimizer", "gpt_config", "train_config", "step", "best_val_loss", "rng", "tokenizer"}
    model = GPT(GPTConfig(**saved["gpt_config"]))
    model.load_state_dict(saved["model"])
    assert saved["optimizer"].keys() == dict(model.named_parameters()).keys()
    assert TrainConfig(**saved["train_config"]) == load_config(TINY)[0] and saved["step"] == 12
    assert saved["tokenizer"] == load_meta("data/tiny")["tokenizer"]


def test_validation_loss_is_the_mean_over_the_whole_split():
    train.main([*TINY, "--eval_iters=1000", "--batch_size=5", "--micro_batch_size=5"])
    saved = checkpoint()
    model = GPT(GPTConfig(**saved["gpt_config"]))
    model.load_state_dict(saved["model"])
    val = torch.tensor(ids("val"))
    n = (len(val) - 1) // 8   # written out anew: 35 windows, of which batches of 5 leave none over; 3 would
    logits, _ = model.eval()(val[:n * 8].view(n, 8))
    expected = F.cross_entropy(logits.flatten(0, 1), val[1:n * 8 + 1]).item()
    assert float(rows()[-1]["val_loss"]) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("micro", [1, 3, 4, 7])
def test_validation_loss_does_not_depend_on_the_micro_batch(micro, capsys):
    Data_ = Data(Path("data/tiny"), load_meta("data/tiny"), "val", 8, 0)
    torch.manual_seed(0)
    model = GPT(GPTConfig(8, 17, 1, 2, 16))
    loss = lambda size: train.evaluate(model, Data_, TrainConfig(batch_size=84, eval_iters=1), size, train.nullcontext(), "cpu")
    assert loss(micro) == pytest.approx(loss(84), rel=1e-6)


def test_accumulation_changes_nothing_but_rounding():
    train.main([*TINY, "--out_dir=whole"])
    train.main([*TINY, "--out_dir=parts", "--micro_batch_size=1"])
    for a, b in zip(rows("whole/metrics.csv"), rows("parts/metrics.csv"), strict=True):
        for key in ("train_loss", "val_loss", "grad_norm"):
            assert a[key] == b[key] == "" or float(a[key]) == pytest.approx(float(b[key]), rel=1e-4)


def test_first_step_equals_one_written_out_by_hand():
    """Loss, clipping, decay on matrices only, AdamW: against torch's own pieces, without train.py."""
    train.main([*TINY, "--max_iters=1", "--weight_decay=0.5", "--grad_clip=0.1", "--warmup_iters=0"])
    torch.manual_seed(1337)
    model = GPT(GPTConfig(8, 17, 2, 2, 16))
    x, y = Data(Path("data/tiny"), load_meta("data/tiny"), "train", 8, 1337).batch(range(4))
    model(x, y)[1].backward()
    norm = torch.sqrt(sum((p.grad ** 2).sum() for p in model.parameters()))
    row = next(r for r in rows() if r["grad_norm"])
    assert float(row["grad_norm"]) == pytest.approx(norm.item(), rel=1e-4) and norm > 0.1
    saved = checkpoint()["model"]
    for name, p in model.named_parameters():
        g = p.grad * 0.1 / norm
        decayed = p * (1 - 1e-2 * 0.5) if p.dim() == 2 else p
        expected = decayed - 1e-2 * g / (g.abs() + 1e-8)   # AdamW's first step: both averages, corrected, are g and g*g
        assert torch.allclose(saved[name], expected, atol=2e-6), name


def test_learning_rate_warms_up_and_follows_a_cosine():
    c = TrainConfig(learning_rate=1.0, min_lr=0.2, warmup_iters=10, lr_decay_iters=110, max_iters=200)
    assert [train.lr_at(s, c) for s in (0, 9, 10, 60, 110, 150)] == pytest.approx([1 / 11, 10 / 11, 1.0, 0.6, 0.2, 0.2])
    assert train.lr_at(200, TrainConfig(learning_rate=1.0, warmup_iters=0, max_iters=200)) == pytest.approx(0.1)


@pytest.mark.parametrize("speed, name", [(0.5, "float32 (bfloat16 is not faster here)"), (3.0, "bfloat16 (bfloat16 is faster here)")])
def test_dtype_is_what_is_fast_on_this_machine(monkeypatch, speed, name):
    monkeypatch.setattr(launch, "bf16_speed", lambda: speed)
    device, bf16, line = launch.choose_device("cpu", "auto")
    assert bf16 == (speed > 1) and line.endswith(name) and launch.choose_device("cpu", "bfloat16")[1]


def test_one_GPU_is_chosen_by_its_number(monkeypatch):
    """A machine without a GPU, made to look like one that has some: torch.cuda.set_device takes a number, "cuda" has none."""
    chosen, empty = [], torch.empty
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "empty", lambda n, device: empty(n))
    for asked, name in (("auto", "cuda"), ("cuda", "cuda"), ("cuda:1", "cuda:1")):
        device, bf16, line = launch.choose_device(asked, "auto")
        assert device == torch.device(name) and bf16 and "NVIDIA H200" in line or asked != "auto"
    assert chosen == [0, 0, 1]


def test_CPU_and_GPU_tensors_both_find_their_way_to_other_processes(monkeypatch):
    """across() sends CPU tensors, DDP and FSDP GPU tensors. torch makes a backend for the latter alone where none is named."""
    dist, named = torch.distributed, []
    monkeypatch.setattr(launch, "rendezvous", lambda url: iter([(dist.HashStore(), 0, 1)]))
    monkeypatch.setattr(dist, "init_process_group", lambda backend=None, **others: named.append(backend))
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    for gpu in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
        launch.join()
    backends = [dist.distributed_c10d.BackendConfig(dist.Backend(name)).get_device_backend_map() for name in named]
    assert backends[0] == {"cpu": "gloo", "cuda": "nccl"} and backends[1]["cpu"] == "gloo"


def test_bf16_trains_too(capsys):
    train.main([*TINY, "--dtype=bfloat16", "--max_iters=6"])
    assert float(rows()[-1]["val_loss"]) < float(rows()[0]["val_loss"])


def test_compile_that_fails_falls_back_and_says_why(monkeypatch, capsys):
    def broken(f):
        raise RuntimeError("no compiler\non this machine")
    monkeypatch.setattr(train.torch, "compile", broken)
    train.main([*TINY, "--compile=True"])
    assert "torch.compile failed, going on without it: RuntimeError: no compiler" in capsys.readouterr().out
    assert checkpoint()["step"] == 12


SWITCHES = ["--use_rope", "--use_gqa", "--n_kv_head=1", "--use_swa", "--window_size=3"]


def test_all_switches_train_resume_and_sample(capsys):
    train.main([*TINY, *SWITCHES, "--out_dir=whole"])
    train.main([*TINY, *SWITCHES, "--max_iters=6", "--lr_decay_iters=12"])
    train.main([*TINY, *SWITCHES, "--init_from=resume"])
    assert same_weights(checkpoint(), checkpoint("whole/ckpt.pt")) and checkpoint()["gpt_config"]["window_size"] == 3
    sample.main(["--out_dir=out", "--max_new_tokens=50", "--device=cpu"])
    GPT.from_pretrained("out").save_pretrained("exported")
    assert json.loads(Path("exported/config.json").read_text())["model_type"] == "starcoder2"
    train.main([*TINY, "--out_dir=plain"])
    fails(train, *TINY, "--out_dir=plain", "--init_from=resume", "--use_rope", match="another architecture: use_rope is False there, not True")


def test_a_trained_run_can_be_uptrained_with_fewer_key_value_heads():
    train.main([*TINY, "--out_dir=first"])
    train.main([*TINY, "--init_from=first", "--use_gqa", "--n_kv_head=1", "--max_iters=6"])
    saved = checkpoint()
    assert saved["gpt_config"]["n_kv_head"] == 1 and saved["model"]["h.0.attn.c_attn.weight"].shape == (16 + 2 * 8, 16)
    assert float(rows()[-1]["val_loss"]) < float(rows()[0]["val_loss"])


def test_best_is_kept_apart_from_last():
    train.main([*TINY, "--learning_rate=1e-2", "--max_iters=24"])
    best, values = checkpoint("out/best.pt"), [float(r["val_loss"]) for r in rows() if r["val_loss"]]
    train.main([*TINY, "--init_from=resume", "--learning_rate=3", "--min_lr=3", "--max_iters=36"])   # ruins the model
    worse = [float(r["val_loss"]) for r in rows() if r["val_loss"]][-1]
    assert worse > min(values) and same_weights(best, checkpoint("out/best.pt")) and not same_weights(best, checkpoint())
    assert checkpoint()["best_val_loss"] == pytest.approx(min(values), abs=1e-5)


def test_eval_only_prints_the_loss_and_touches_nothing(capsys):
    train.main(TINY)
    before = {p: p.read_bytes() for p in Path("out").iterdir()}
    train.main([*TINY, "--init_from=resume", "--eval_only"])
    assert f"validation loss {float(rows()[-1]['val_loss']):.4f}" in capsys.readouterr().out.splitlines()[-1]
    assert before == {p: p.read_bytes() for p in Path("out").iterdir()}


def test_checkpoints_come_after_so_many_steps_or_so_many_minutes(monkeypatch):
    def saved_at(*flags):
        steps = []
        monkeypatch.setattr(train.weights, "save_checkpoint", lambda path, model, optimizer, config, step, *rest: path.name == "ckpt.pt" and steps.append(step))
        monkeypatch.setattr(train.GPT, "from_pretrained", lambda path: GPT(GPTConfig(8, 17, 1, 2, 16)))
        train.main([*TINY, "--eval_interval=100", *flags])
        return steps
    assert saved_at() == [12] and saved_at("--checkpoint_interval=5") == [5, 10, 12]
    assert saved_at("--checkpoint_minutes=0") == list(range(1, 13))


def test_scratch_run_keeps_what_an_earlier_run_left(capsys):
    train.main(TINY)
    first = checkpoint()
    for n in (1, 2):
        train.main([*TINY, f"--seed={n}"])
        assert sorted(p.name for p in Path(f"out/old{n}").iterdir()) == ["best.pt", "ckpt.pt", "metrics.csv"]
        assert f"are now in {Path('out', f'old{n}')}" in capsys.readouterr().out
    assert same_weights(checkpoint("out/old1/ckpt.pt"), first) and not same_weights(checkpoint("out/old2/ckpt.pt"), first)


def test_muon_moves_the_matrices_inside_the_blocks_and_adamw_the_rest():
    model = GPT(GPTConfig(8, 17, 1, 2, 16))
    c = TrainConfig(optimizer="muon", learning_rate=0.1, beta1=0.8, weight_decay=0.0)
    adamw, muon = train.make_optimizers(model, c, torch.device("cpu"))
    moved = [{id(p) for group in optimizer.param_groups for p in group["params"]} for optimizer in (adamw, muon)]
    names = [{name for name, p in model.named_parameters() if id(p) in ids} for ids in moved]
    assert names[1] == {f"h.0.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    assert not names[0] & names[1] and names[0] | names[1] == dict(model.named_parameters()).keys()
    assert muon.param_groups[0]["momentum"] == 0.8 and adamw.param_groups[0]["betas"][0] == 0.8

    W, before = model.h[0].attn.c_proj.weight, model.h[0].attn.c_proj.weight.detach().clone()
    W.grad = torch.diag(10.0 ** torch.arange(0, -1, -1 / 16))   # directions of very different length: the step has them nearly alike
    muon.step()
    lengths = torch.linalg.svdvals(before - W.detach()) / (0.1 * 0.2 * 16**0.5)   # 0.2 sqrt(width): as long as AdamW's steps
    assert lengths.min() > 0.5 and lengths.max() < 1.5


@pytest.mark.parametrize("name", ["shakespeare", "stdlib"])
@pytest.mark.parametrize("speed, optimizer", [(0.02, "adamw"), (0.5, "muon"), (4.0, "muon")])
def test_small_configs_take_muon_where_the_CPU_can_multiply_in_bf16(name, speed, optimizer, monkeypatch):
    monkeypatch.setattr(launch, "bf16_speed", lambda: speed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    c, _ = load_config([str(HERE / f"config/{name}.py")])
    assert c.optimizer == optimizer and c.learning_rate == (1.5e-2 if optimizer == "muon" else 3e-3)


def test_learning_rate_reaches_both_optimizers():
    def weights(*flags):
        train.main([*TINY, "--optimizer=muon", "--warmup_iters=0", "--max_iters=1", "--min_lr=0", *flags])
        return checkpoint()["model"]
    start, moved, ended = weights("--learning_rate=0"), weights("--learning_rate=1e-2"), weights("--learning_rate=1e-2", "--lr_decay_iters=0")
    for name in ("wte.weight", "h.0.mlp.c_fc.weight"):
        assert not torch.equal(start[name], moved[name]) and torch.equal(start[name], ended[name])   # min_lr = 0: nothing moves


@pytest.mark.parametrize("first, then", [("adamw", "muon"), ("muon", "adamw")])
def test_resuming_with_another_optimizer_is_refused(first, then):
    train.main([*TINY, f"--optimizer={first}", "--max_iters=2"])
    fails(train, *TINY, f"--optimizer={then}", "--init_from=resume", match=f"was trained with optimizer={first}.*--optimizer={first} goes on")


# ----------------------------------------------------------------------------------------------------------------------
# Resuming and starting from weights

@pytest.mark.parametrize("at, optimizer", [(4, "adamw"), (6, "adamw"), (11, "adamw"), (7, "muon")])
def test_resumed_run_is_exact_to_the_bit(at, optimizer):
    flags = [*TINY, f"--optimizer={optimizer}", "--dropout=0.2", "--micro_batch_size=2", "--checkpoint_interval=1", "--lr_decay_iters=12"]
    train.main([*flags, "--out_dir=whole"])
    train.main([*flags, f"--max_iters={at}"])
    train.main([*flags, "--init_from=auto"])
    a, b = checkpoint(), checkpoint("whole/ckpt.pt")
    assert same_weights(a, b)
    for name, state in a["optimizer"].items():
        assert all(torch.equal(v, b["optimizer"][name][k]) for k, v in state.items())
    keys = ("step", "train_loss", "val_loss", "lr", "grad_norm")
    resumed = [tuple(r[k] for k in keys) for r in rows() if int(r["step"]) % 3 == 0]   # the stop at 4 or 11 adds a line of its own
    assert resumed == [tuple(r[k] for k in keys) for r in rows("whole/metrics.csv") if int(r["step"]) % 3 == 0]


@pytest.mark.parametrize("damage", ["", "7,", "7,224,1.0", "\0" * 300, "seven,1,,,,,,"])
def test_metrics_that_a_crash_cut_short_do_not_stop_a_resumed_run(damage):
    train.main([*TINY, "--max_iters=6", "--lr_decay_iters=12"])
    with open("out/metrics.csv", "a") as f:
        f.write(damage)
    train.main([*TINY, "--init_from=resume"])
    assert [int(r["step"]) for r in rows()] == [0, 3, 6, 6, 9, 12, 12]


def test_metrics_that_are_not_ours_are_kept_aside():
    train.main([*TINY, "--max_iters=6", "--lr_decay_iters=12"])
    theirs = Path("out/metrics.csv").read_text().replace(",", ";")
    Path("out/metrics.csv").write_text(theirs, encoding="utf-8-sig")
    train.main([*TINY, "--init_from=resume"])
    assert Path("out/metrics.csv.unknown").read_text(encoding="utf-8-sig") == theirs and [int(r["step"]) for r in rows()] == [6, 9, 12, 12]


def test_peak_is_of_the_device_or_unknown():
    names = {"NVIDIA H200": 989e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA L4": 121e12, "NVIDIA L40S": None,
             "NVIDIA GeForce RTX 4090": 165e12, "NVIDIA GeForce RTX 4090 Laptop GPU": None, "NVIDIA GH200 480GB": None, "Tesla T4": None}
    names |= {"NVIDIA H200 NVL": 835e12, "NVIDIA GeForce RTX 4090 D": None, "NVIDIA GeForce RTX 3090 Ti": None}
    assert {name: launch.peak_flops(name) for name in names} == names


def test_dropout_is_drawn_anew_at_every_step(monkeypatch):
    states, forward = [], GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda self, *a: (self.training and states.append(torch.get_rng_state().numpy().tobytes())) or forward(self, *a))
    train.main([*TINY, "--dropout=0.2", "--max_iters=6"])
    assert len(states) == len(set(states)) == 6


def test_auto_starts_where_there_is_nothing_to_resume():
    train.main([*TINY, "--init_from=auto"])
    assert checkpoint()["step"] == 12


def test_changed_settings_are_named_on_resume(capsys):
    train.main(TINY)
    train.main([*TINY, "--init_from=resume", "--batch_size=8", "--max_iters=14"])
    assert "batch_size was 4, is 8" in capsys.readouterr().out


@pytest.mark.parametrize("argv, match", [
    (["--n_embd=32"], "has another architecture: n_embd is 16 there, not 32"),
    (["--block_size=4"], "another architecture: block_size is 8 there, not 4"),
    (["--bias=False"], "another architecture: bias is True there, not False"),
    (["--out_dir=elsewhere"], "elsewhere.ckpt.pt does not exist: nothing to resume"),
    (["--n_layer=12"], "another architecture: n_layer is 2 there, not 12"),
    (["--dataset=other"], "trained with another tokenizer than data/other")])
def test_resuming_what_does_not_fit_is_one_clear_line(argv, match):
    train.main(TINY)
    Path("other.txt").write_text("another alphabet?\n" * 50)
    prepare_text(Path("data/other"), ["other.txt"], "char")
    before = Path("out/ckpt.pt").read_bytes()
    fails(train, *TINY, "--init_from=resume", *argv, match=match)
    assert Path("out/ckpt.pt").read_bytes() == before


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.mark.parametrize("spoil, match", [
    (lambda raw: raw[:len(raw) // 2], "ckpt.pt is cut short or not a checkpoint"),
    (lambda raw: raw[:-1], "ckpt.pt is cut short or not a checkpoint"),
    (lambda raw: b"", "ckpt.pt is cut short or not a checkpoint"),
    (lambda raw: b"hello", "ckpt.pt"),
    (lambda raw: torch.save({"model": RunsCode()}, "evil.pt") or Path("evil.pt").read_bytes(), "could run code"),
    (lambda raw: torch.save({"model": {}}, "evil.pt") or Path("evil.pt").read_bytes(), "is not a checkpoint of train.py"),
    (lambda raw: torch.save(checkpoint() | {"gpt_config": {"n_legs": 4}}, "evil.pt") or Path("evil.pt").read_bytes(), "is not a checkpoint of train.py"),
    (lambda raw: torch.save(checkpoint() | {"model": 3}, "evil.pt") or Path("evil.pt").read_bytes(), "is not a checkpoint of train.py"),
    (lambda raw: torch.save(checkpoint() | {"optimizer": {}}, "evil.pt") or Path("evil.pt").read_bytes(), "optimizer's state is not of this model"),
    (lambda raw: torch.save(checkpoint() | {"model": {"wte.weight": torch.ones(1)}}, "evil.pt") or Path("evil.pt").read_bytes(), r"lacks 27 tensor\(s\)")])
def test_broken_or_hostile_checkpoint_is_one_clear_line(spoil, match):
    train.main(TINY)
    spoilt = spoil(Path("out/ckpt.pt").read_bytes())
    Path("out/ckpt.pt").write_bytes(spoilt)
    Path("out/best.pt").unlink()
    fails(train, *TINY, "--init_from=resume", match=match)
    assert Path("out/ckpt.pt").read_bytes() == spoilt and not Path("harmed").exists()
    if "optimizer" not in match:
        fails(sample, "--out_dir=out", match=match)


def test_folder_of_weights_or_a_run_is_a_start(capsys):
    train.main([*TINY, "--out_dir=first"])
    GPT.from_pretrained("first").save_pretrained("weights")
    for folder in ("first", "weights"):
        train.main([*TINY, f"--init_from={folder}", "--eval_interval=1", "--max_iters=1"])
        assert float(rows()[0]["val_loss"]) == pytest.approx(float(rows("first/metrics.csv")[-1]["val_loss"]), abs=1e-5)
        assert checkpoint()["step"] == 1   # a new run: its own steps, its own optimizer


def test_run_from_weights_of_another_shape_resumes_with_the_same_flags():
    GPT(GPTConfig(8, 17, 1, 1, 8)).save_pretrained("weights")
    flags = [f for f in TINY if not f.startswith("--n_")]
    train.main([*flags, "--init_from=weights", "--max_iters=6"])
    for more in ("--max_iters=8", "--max_iters=10"):
        train.main([*flags, "--init_from=resume", more])
    assert checkpoint()["step"] == 10 and checkpoint()["gpt_config"]["n_embd"] == 8


def test_what_is_given_counts_even_where_it_is_the_default():
    GPT(GPTConfig(2048, 17, 1, 1, 8, use_rope=True)).save_pretrained("weights")
    flags = [f for f in TINY if not f.startswith(("--n_", "--block_size"))]
    fails(train, *flags, "--init_from=weights", "--use_rope=False", match="use_rope=False: weights was trained with RoPE")
    fails(train, *flags, "--init_from=weights", f"--block_size={GPTConfig.block_size}", match="block_size=1024 needs 1025")
    train.main([*TINY, f"--vocab_size={GPTConfig.vocab_size}", "--max_iters=0"])
    assert checkpoint("out/best.pt")["gpt_config"]["vocab_size"] == GPTConfig.vocab_size


def test_of_a_run_the_best_checkpoint_is_used_and_else_the_last():
    train.main([*TINY, "--max_iters=6"])
    os.replace("out/ckpt.pt", "out/best.pt")
    train.main([*TINY, "--out_dir=later"])
    os.replace("later/ckpt.pt", "out/ckpt.pt")
    for name in ("best.pt", "ckpt.pt"):
        assert all(torch.equal(t, checkpoint(f"out/{name}")["model"][k]) for k, t in GPT.from_pretrained("out").state_dict().items() if "head" not in k)
        Path("out", name).unlink()


def test_export_into_the_folder_of_a_run_does_not_hide_the_run(capsys):
    train.main(TINY)
    GPT.from_pretrained("out").save_pretrained("out")
    Path("out/model.safetensors").write_bytes(b"cut off")   # who reads it notices
    capsys.readouterr()
    train.main([*TINY, "--init_from=resume"])
    assert "more of it" in capsys.readouterr().out
    sample.main(["--out_dir=out", "--max_new_tokens=5", "--device=cpu"])


def test_weights_may_be_trained_on_with_a_shorter_block_size():
    train.main([*TINY, "--out_dir=first"])
    GPT.from_pretrained("first").save_pretrained("weights")
    flags = [f for f in TINY if not f.startswith(("--n_", "--block_size"))]
    train.main([*flags, "--init_from=weights", "--block_size=4", "--dropout=0.1"])
    assert checkpoint()["gpt_config"] == dict(checkpoint("first/ckpt.pt")["gpt_config"], block_size=4, dropout=0.1)


@pytest.mark.parametrize("argv, match", [
    (["--init_from=weights", "--n_embd=32"], "weights has another architecture: n_embd is 16 there, not 32"),
    (["--init_from=weights", "--block_size=16"], "block_size=16: weights has only 8 positions"),
    (["--init_from=weights", "--dataset=other"], "weights was trained with another tokenizer than data/other"),
    (["--init_from=lower", "--dataset=upper"], "lower was trained with another tokenizer than data/upper"),
    (["--init_from=nowhere"], "nowhere: not one of gpt2, gpt2-medium")])
def test_weights_that_do_not_fit_are_one_clear_line(argv, match):
    GPT(GPTConfig(8, 17, 2, 2, 16)).save_pretrained("weights")
    train.main([*TINY, "--out_dir=lower", "--max_iters=0"])
    Path("other.txt").write_text("".join(map(chr, range(0x100, 0x112))) * 99, encoding="utf-8")
    prepare_text(Path("data/other"), ["other.txt"], "char")
    Path("upper.txt").write_text(LINES.upper() * 40, encoding="utf-8")   # as many characters, but others
    prepare_text(Path("data/upper"), ["upper.txt"], "char")
    fails(train, *TINY, *argv, match=match)


# ----------------------------------------------------------------------------------------------------------------------
# Faults

def test_out_dir_that_cannot_be_written():
    Path("occupied").write_text("a file")
    fails(train, *TINY, "--out_dir=occupied/out", match="out_dir=occupied.out: Not a directory")
    assert Path("occupied").read_text() == "a file"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_full_disk_leaves_the_previous_checkpoint_whole():
    train.main([*TINY, "--max_iters=6"])
    before = Path("out/ckpt.pt").read_bytes()
    Path("out/ckpt.pt.tmp").symlink_to("/dev/full")
    fails(train, *TINY, "--init_from=resume", match="cannot save out.ckpt.pt .*what was there before is untouched")
    assert Path("out/ckpt.pt").read_bytes() == before and checkpoint()["step"] == 6


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_loss_that_is_not_finite_stops_before_anything_is_overwritten(where, monkeypatch):
    train.main([*TINY, "--max_iters=6"])
    before = {p: p.read_bytes() for p in Path("out").glob("*.pt")}
    forward = GPT.forward

    def bad(self, idx, targets=None):
        logits, loss = forward(self, idx, targets)
        if self.training:
            # a constant has no gradient; the root of zero has a value, but its slope is not finite
            loss = loss + (float("inf") if where == "loss" else (self.ln_f.weight - self.ln_f.weight.detach()).abs().sqrt().sum())
        return logits, loss
    monkeypatch.setattr(GPT, "forward", bad)
    for flags in ([], ["--checkpoint_interval=1"]):
        fails(train, *TINY, "--init_from=resume", *flags, match="step [79]: (loss|gradient norm) (inf|nan). Nothing was overwritten")
        assert before == {p: p.read_bytes() for p in Path("out").glob("*.pt")}


def start(*argv, script="train.py"):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(HERE / script), *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, encoding="utf-8")


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_finishes_the_step_saves_and_exits_0(number):
    process = start(*TINY, "--max_iters=1000000", "--eval_interval=1000000", "--checkpoint_interval=1000000")
    while "| loss" not in process.stdout.readline():
        pass
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in err and err.endswith("finishing this step; Ctrl-C once more stops at once\n")
    assert out.splitlines()[-1].endswith("--checkpoint_interval=1000000 --init_from=resume") and checkpoint()["step"] > 0


def test_signal_before_the_first_step_leaves_nothing_to_resume(monkeypatch, capsys):
    install = signal.signal

    def install_and_raise(number, handler):
        before = install(number, handler)
        if number == signal.SIGTERM and not raised:   # both are installed, the last thing before the loop
            raised.append(True)
            signal.raise_signal(signal.SIGINT)
        return before
    raised = []
    monkeypatch.setattr(train.signal, "signal", install_and_raise)
    train.main([*TINY, "--init_from=scratch"])
    assert not Path("out/ckpt.pt").exists() and capsys.readouterr().out.splitlines()[-1].endswith("--init_from=scratch")


def test_command_line_prints_one_line_and_no_traceback():
    for script, argv in (("train.py", ["--n_laye=3"]), ("sample.py", ["--out_dir=nowhere"]), ("prepare_data.py", ["nothing"])):
        process = start(*argv, script=script)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 1 and err.splitlines()[-1].startswith("error: ") and "Traceback" not in err
        assert len([line for line in err.splitlines() if not line.startswith("device:")]) == 1


# ----------------------------------------------------------------------------------------------------------------------
# Several processes: gloo on this machine's CPU, started by torchrun as a user would

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
LONGER = [*TINY, *SWITCHES, "--batch_size=12", "--max_iters=30", "--lr_decay_iters=30", "--learning_rate=3e-3", "--eval_interval=10", "--log_interval=1"]

# Many runs of train.py in one set of processes, for starting one takes seconds. argv: a list of runs, or of folders to copy.
# Beside every checkpoint each process notes the bytes it holds itself.
MANY = """
import json, os, shutil, sys, torch, train
clip, save, held = torch.nn.utils.clip_grad_norm_, train.weights.save_checkpoint, {}

def size(tensors):
    tensors = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in tensors if t.dim())

def clip_and_note(params, norm):
    params = list(params)
    held["gradients"] = size(p.grad for p in params)
    return clip(params, norm)

def save_and_note(path, model, optimizers, *rest):
    held["parameters"] = size(model.parameters())
    held["optimizer"] = size(t for optimizer in optimizers for state in optimizer.state.values() for t in state.values())
    with open(f"{path}.{rank}.json", "w") as f:
        json.dump(held, f)
    save(path, model, optimizers, *rest)

torch.nn.utils.clip_grad_norm_, train.weights.save_checkpoint = clip_and_note, save_and_note
train.GPT.generate = lambda self, idx, *args, **options: idx   # no sample at the end of every run
store, rank, world = train.launch.join()
for i, argv in enumerate(json.loads(sys.argv[1])):
    if argv[0] == "copy":
        if rank == 0:
            shutil.copytree(*argv[1:])
    else:
        train.train(*train.launch.settings(argv, "", train.TrainConfig, train.GPTConfig), argv, torch.distributed.PrefixStore(str(i), store), rank, world)
    train.launch.wait_for_all(store, f"end {i}")
os._exit(0)
"""


def torchrun(script, *argv, n=2, options=("--standalone",)):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    if "\n" in str(script):
        Path("script.py").write_text(script)
        script = "script.py"
    command = [sys.executable, "-m", "torch.distributed.run", *options, f"--nproc_per_node={n}", str(script), *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, encoding="utf-8")


def finish(process):
    """-> stdout, the lines on stderr that are ours; torchrun adds its own, at a failure a traceback of itself, never one of ours"""
    out, process.err = process.communicate(timeout=200)
    err = process.err
    assert err.count("Traceback (most recent call last)") == (process.returncode != 0), err
    ours = [line for line in err.split("Traceback (most recent call last)")[0].splitlines() if not re.match(r"[WE]\d{4} ", line)]
    return out, ours


def fails_at_once(process, match):
    """All processes end, with one line from one of them, which is also what torchrun names as the cause."""
    out, ours = finish(process)
    assert process.returncode == 1 and len(ours) == 1 and re.search(match, ours[0]), ours
    assert f"traceback : {ours[0]}" in process.err.split("Root Cause")[1]


def workers(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def read_until(process, text):
    while text not in (line := process.stdout.readline()):
        assert line, process.stderr.read()


@pytest.fixture(autouse=True)
def no_orphans(home):
    yield
    if sys.platform == "linux":
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                left = f"PWD={home}".encode() in path.read_bytes().split(b"\0") or os.readlink(path.parent / "cwd") == str(home)
            except OSError:
                continue
            assert not left or int(path.parent.name) == os.getpid(), (path.parent / "cmdline").read_bytes()


def all_modes(folder, n):
    """Train in every mode, whole and resumed from every other: folder/one3, ddp3, fsdp3-from-one3, ..."""
    micro = {"one1": 12, "one3": 4, "ddp1": 12 // n, "ddp3": 4 // n, "fsdp1": 12 // n, "fsdp3": 4 // n}
    flags = {mode: [*LONGER, f"--micro_batch_size={m}", *(["--fsdp"] if mode[0] == "f" else [])] for mode, m in micro.items()}
    def whole(mode):
        return [*flags[mode], f"--out_dir={mode}"]
    def half(mode):
        return [*flags[mode], f"--out_dir={mode}-half", "--max_iters=15"]
    def resumed(mode, start):
        return [*flags[mode], f"--out_dir={mode}-from-{start}", "--init_from=resume"]
    alone, together = ["one1", "one3"], ["ddp1", "ddp3", "fsdp1", "fsdp3"]
    halves = ["one3", "ddp3", "fsdp3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("text.txt").write_text(LINES * 40, encoding="utf-8", newline="")
        prepare_text(Path("data/tiny"), ["text.txt"], "char")
        for argv in [*map(whole, alone), half("one3")]:
            train.main(argv)
        jobs = [*map(whole, together), half("ddp3"), half("fsdp3")]
        for start in halves:
            jobs += [["copy", f"{start}-half", f"{mode}-from-{start}"] for mode in halves]
            jobs += [resumed(mode, start) for mode in ("ddp3", "fsdp3")]
        jobs += [[*whole("fsdp3"), "--out_dir=fsdp-recomputed", "--checkpoint_activations", "--reshard_after_forward=False"]]
        jobs += [[*f("fsdp3"), "--dtype=bfloat16", f"--out_dir={name}"] for f, name in ((whole, "bf16"), (half, "bf16-resumed"))]
        jobs += [[*whole("fsdp3"), "--dtype=bfloat16", "--out_dir=bf16-resumed", "--init_from=resume"]]
        muon = [[*f(mode), "--optimizer=muon", f"--out_dir={mode}-muon{name}"] for mode in ("one3", "ddp3", "fsdp3") for f, name in ((whole, ""), (half, "-resumed"))]
        muon += [[*whole(mode), "--optimizer=muon", f"--out_dir={mode}-muon-resumed", "--init_from=resume"] for mode in ("ddp3", "fsdp3")]
        train.main(muon[0])
        jobs += muon[2:]
        process = torchrun(MANY, json.dumps(jobs), n=n)
        finish(process)
        assert process.returncode == 0
        for start in halves:
            train.main(resumed("one3", start))
    return folder


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def modes(request, tmp_path_factory):
    return all_modes(tmp_path_factory.mktemp("modes"), request.param), request.param


def same_course(a, b, after=0, rel=1e-5):
    table = [[r for r in rows(path / "metrics.csv") if int(r["step"]) > after] for path in (a, b)]
    assert len(table[0]) == len(table[1]) > 10
    for x, y in zip(*table, strict=True):
        for key in ("step", "train_loss", "val_loss", "grad_norm", "lr"):
            assert x[key] == y[key] or float(x[key]) == pytest.approx(float(y[key]), rel=rel), (a.name, b.name, x["step"], key)


def same_state(a, b):
    a, b = checkpoint(a / "ckpt.pt"), checkpoint(b / "ckpt.pt")
    return same_weights(a, b) and all(torch.equal(t, b["optimizer"][name][k]) for name, state in a["optimizer"].items() for k, t in state.items())


@pytest.mark.parametrize("mode", ["one1", "ddp1", "ddp3", "fsdp1", "fsdp3", "fsdp-recomputed"])
def test_every_mode_gives_the_losses_and_gradient_norms_of_one_process(modes, mode):
    folder, n = modes
    same_course(folder / "one3", folder / mode)


def test_muon_too_in_every_mode_and_resumes_to_the_bit(modes):
    folder, n = modes
    for mode in ("ddp3", "fsdp3"):
        same_course(folder / "one3-muon", folder / f"{mode}-muon", rel=1e-2)   # it multiplies in bfloat16, and FSDP sums the parts
        assert same_state(folder / f"{mode}-muon", folder / f"{mode}-muon-resumed")
    assert not same_state(folder / "one3-muon", folder / "one3")


@pytest.mark.parametrize("start", ["one3", "ddp3", "fsdp3"])
@pytest.mark.parametrize("mode", ["one3", "ddp3", "fsdp3"])
def test_every_mode_goes_on_from_a_checkpoint_of_every_other(modes, mode, start):
    folder, n = modes
    same_course(folder / start, folder / f"{mode}-from-{start}", after=15)
    if mode == start:   # to the bit
        assert same_state(folder / mode, folder / f"{mode}-from-{mode}")


def test_FSDP_in_bf16_keeps_its_weights_in_float32_and_resumes_to_the_bit(modes):
    folder, n = modes
    assert all(t.dtype == torch.float32 for t in checkpoint(folder / "bf16/ckpt.pt")["model"].values())
    assert same_state(folder / "bf16", folder / "bf16-resumed") and not same_state(folder / "bf16", folder / "fsdp3")
    bf16, exact = (float(rows(folder / mode / "metrics.csv")[-1]["val_loss"]) for mode in ("bf16", "fsdp3"))
    assert bf16 == pytest.approx(exact, rel=1e-2)


def test_checkpoints_of_all_modes_are_alike_and_open_everywhere(modes, capsys):
    folder, n = modes
    plain = checkpoint(folder / "one3/ckpt.pt")
    for mode in ("ddp3", "fsdp3"):
        saved = checkpoint(folder / mode / "ckpt.pt")
        for part in ("model", "optimizer"):
            assert saved[part].keys() == plain[part].keys()
        assert all(type(t) is torch.Tensor and t.shape == plain["model"][name].shape for name, t in saved["model"].items())
        GPT.from_pretrained(folder / mode).save_pretrained("exported")
        sample.main([f"--out_dir={folder / mode}", "--max_new_tokens=5", "--device=cpu"])


def test_FSDP_holds_one_part_of_N_and_DDP_everything(modes):
    folder, n = modes
    model = GPT.from_pretrained(folder / "one3")
    whole = 4 * model.num_params()
    for rank in range(n):
        ddp, fsdp = (json.loads((folder / mode / f"ckpt.pt.{rank}.json").read_text()) for mode in ("ddp3", "fsdp3"))
        assert ddp == dict(parameters=whole, gradients=whole, optimizer=2 * whole)
        for key, size in ddp.items():
            assert fsdp[key] == pytest.approx(size / n, rel=0.1)   # 17 rows of the embedding are not cut evenly


def test_only_rank_0_speaks_and_all_agree_on_the_batch():
    process = torchrun(HERE / "train.py", *TINY)
    out, ours = finish(process)
    assert process.returncode == 0 and not ours
    assert "batch: 4 sequences = 1 accumulation step(s) x 2 x 2 processes; 32 tokens a step" in out
    for line in ("device: cpu", "step 12: validation loss", "more of it: python sample.py"):
        assert out.count(line) == 1


def test_two_launches_meet_as_two_nodes():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    options = ("--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=7")
    both = [torchrun(HERE / "train.py", *LONGER, n=1, options=options) for _ in range(2)]
    outs = [finish(process)[0] for process in both]
    assert [p.returncode for p in both] == [0, 0] and sorted("more of it" in out for out in outs) == [False, True]
    train.main([*LONGER, "--out_dir=alone"])
    same_course(Path("alone"), Path("out"))


def test_fsdp_without_torchrun_names_the_right_command():
    fails(train, *TINY, "--fsdp", match="torchrun --nproc_per_node=2 train.py --dataset=tiny .*--fsdp")


@pytest.mark.parametrize("argv, match", [(["--batch_size=5"], "error: batch_size=5 cannot be shared by 2 process.es. in parts of 2 sequences"),
                                         (["--n_laye=5"], "error: --n_laye is not a setting, did you mean n_layer"),
                                         (["--dataset=nothing"], "error: unknown dataset 'nothing'"),
                                         (["own.py"], "error: not all processes read the same settings")])
def test_what_all_processes_stumble_over_is_said_once(argv, match):
    Path("own.py").write_text("import os\nweight_decay = 0.1 * int(os.environ['RANK'])")
    fails_at_once(torchrun(HERE / "train.py", *TINY, *argv), match)


ONE_FAILS = """
import os, train
from model import GPT
forward, calls = GPT.forward, []

def bad(self, idx, targets=None):
    logits, loss = forward(self, idx, targets)
    calls.append(self.training)
    if os.environ["RANK"] == "1" and sum(calls) == 5:
        {fault}
    return logits, loss
GPT.forward = bad
train.launch.run(train.main)
"""


@pytest.mark.parametrize("fault, match, flags", [("loss = loss * float('nan')", "error: step [45]: loss nan. Nothing was overwritten", []),
                                                 ("loss = loss * float('nan')", "error: step [45]: loss nan. Nothing was overwritten", ["--fsdp"]),
                                                 ("raise train.InputError('only here')", "error: only here", []),
                                                 ("raise MemoryError", "error: not enough memory", ["--fsdp"])])
def test_what_goes_wrong_on_one_rank_ends_all_with_its_one_line(fault, match, flags):
    fails_at_once(torchrun(ONE_FAILS.format(fault=fault), *TINY, *flags, "--max_iters=1000", "--checkpoint_interval=1"), match)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_full_disk_on_rank_0_ends_all_and_leaves_the_previous_checkpoint_whole():
    train.main([*TINY, "--max_iters=6"])
    before = Path("out/ckpt.pt").read_bytes()
    Path("out/ckpt.pt.tmp").symlink_to("/dev/full")
    fails_at_once(torchrun(HERE / "train.py", *TINY, "--init_from=resume"), "error: cannot save out.ckpt.pt .*what was there before is untouched")
    assert Path("out/ckpt.pt").read_bytes() == before


def test_missing_dataset_is_prepared_by_one_while_the_others_wait():
    shutil.rmtree("data/tiny")
    process = torchrun("""
import os, time, train
from pathlib import Path
from prepare_data import prepare_text

def prepare(name, shards):
    with open("prepared.txt", "a") as f:
        f.write(os.environ["RANK"])
    time.sleep(1)
    prepare_text(Path("data/tiny"), ["text.txt"], "char")
train.prepare = prepare
train.launch.run(train.main)
""", *TINY)
    finish(process)
    assert process.returncode == 0 and Path("prepared.txt").read_text() == "0" and checkpoint()["step"] == 12


def test_report_to_torchrun_appears_whole(monkeypatch):
    seen = []
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "error.json")
    monkeypatch.setattr(os, "fsync", lambda fd: seen.append(Path("error.json").exists()))   # all is written, nothing shown yet
    launch.report("what went wrong")
    assert seen == [False] and json.loads(Path("error.json").read_text())["message"]["message"] == "what went wrong"


def test_machines_that_see_different_checkpoints_are_told():
    train.main([*TINY, "--max_iters=6"])
    train.main([*TINY, "--max_iters=8", "--out_dir=other"])
    process = torchrun("""
import os, sys, train
if os.environ["RANK"] == "1":
    sys.argv.append("--out_dir=other")
train.launch.run(train.main)
""", *TINY, "--init_from=auto")
    fails_at_once(process, "error: out is at step 6 here and further elsewhere: it must be one folder that all machines share")


def test_gradients_are_sent_once_a_step_however_many_parts_it_has():
    process = torchrun("""
import os, train
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
sent = []

class Counting(train.DistributedDataParallel):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_comm_hook(None, lambda state, bucket: sent.append(1) or allreduce_hook(state, bucket))
train.DistributedDataParallel = Counting
across = train.across

def note(*args):
    with open(f"sent-{os.environ['RANK']}", "w") as f:
        f.write(str(len(sent)))
    return across(*args)
train.across = note
train.launch.run(train.main)
""", *TINY, "--micro_batch_size=1")
    finish(process)
    assert Path("sent-0").read_text() == Path("sent-1").read_text() == "13"   # 12 steps of 2 parts each, and the pass on zeros before


@needs_linux
@pytest.mark.parametrize("flags", [[], ["--fsdp"]])
def test_killed_worker_restarts_the_group_which_goes_on_from_the_last_checkpoint(flags):
    argv = [*LONGER, *flags, "--max_iters=50", "--checkpoint_interval=5", "--init_from=auto"]
    whole = torchrun(HERE / "train.py", *argv, "--out_dir=whole")
    finish(whole)
    process = torchrun(HERE / "train.py", *argv, options=("--standalone", "--max-restarts=1"))
    read_until(process, "step 13/50")
    os.kill(workers(process)[1], signal.SIGKILL)
    out, ours = finish(process)
    assert process.returncode == 0 and len(ours) == 1 and "error: another process is gone" in ours[0], process.err
    assert "resuming out/ckpt.pt at step" in out and same_state(Path("out"), Path("whole"))


@needs_linux
@pytest.mark.parametrize("flags", [[], ["--fsdp"]])
def test_SIGTERM_to_torchrun_saves_and_every_worker_exits_0(flags):
    """torchrun itself then always ends with status 1 and a traceback of its own SignalException."""
    # At the end nothing may be sent from process to process: one that has left resets the connections of one that still reads.
    process = torchrun("""
import os, torch, train
leave, train_ = os._exit, train.train

def and_then_silence(*args):
    train_(*args)
    torch.distributed.all_reduce = None
train.train = and_then_silence

def note(status):
    with open(f"left-{os.environ['RANK']}", "w") as f:
        f.write(str(status))
    leave(status)
os._exit = note
train.launch.run(train.main)
""", *TINY, *flags, "--max_iters=1000000", "--eval_interval=1000000")
    read_until(process, "step 30/")
    process.send_signal(signal.SIGTERM)
    out, ours = finish(process)
    assert not ours and checkpoint()["step"] >= 30
    assert "SIGTERM: stopped at step" in out and "torchrun --nproc_per_node=2 train.py" in out.splitlines()[-1]
    assert Path("left-0").read_text() == Path("left-1").read_text() == "0"


def killed_run_equals_whole_run(mode, kills, steps):
    """kill -9 of the process, or of any of two, at random moments, also while it starts; then once more to the end."""
    flags = [*TINY, f"--max_iters={steps}", "--dropout=0.1", "--checkpoint_interval=1", "--eval_interval=50", "--log_interval=50"]
    flags += ["--fsdp"] if mode == "fsdp" else []
    begin = functools.partial(torchrun, HERE / "train.py") if mode != "one" else start
    whole = begin(*flags, "--out_dir=whole")
    whole.communicate(timeout=600)
    assert whole.returncode == 0
    rng, died = random.Random(time.time_ns()), 0
    while died < kills:
        process = begin(*flags, "--init_from=auto")
        if starting := rng.random() < 0.2:
            while mode != "one" and len(workers(process)) < 2:
                time.sleep(0.02)
        else:
            while (line := process.stdout.readline()) and not line.startswith("step "):
                pass
        time.sleep(rng.random() * (3 if starting else 0.4))
        try:
            os.kill(rng.choice(workers(process)) if mode != "one" else process.pid, signal.SIGKILL)
        except (IndexError, ProcessLookupError):   # it had come to its end
            pass
        process.communicate(timeout=120)
        died += process.returncode != 0
        if Path("out/ckpt.pt").exists() and checkpoint()["step"] == steps:   # readable after every kill
            break
    begin(*flags, "--init_from=auto").communicate(timeout=600)
    assert checkpoint()["step"] == steps and same_state(Path("out"), Path("whole"))
    assert [r["val_loss"] for r in rows() if r["val_loss"]] == [r["val_loss"] for r in rows("whole/metrics.csv") if r["val_loss"]]
    return died


@needs_linux
def test_killed_twice_and_resumed_is_exact_to_the_bit():
    assert killed_run_equals_whole_run("one", kills=2, steps=400) == 2


@needs_linux
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["one", "ddp", "fsdp"])
def test_killed_67_times_and_resumed_is_exact_to_the_bit(mode):
    assert killed_run_equals_whole_run(mode, kills=67, steps=5000) == 67


@pytest.mark.slow
@pytest.mark.parametrize("n_embd", [16, 512])   # 512: enough for DDP to need several buffers
@pytest.mark.parametrize("recompute", [[], ["--checkpoint_activations"]])
@pytest.mark.parametrize("mode", ["alone", "ddp", "fsdp"])
def test_compile_in_every_mode_compiles_and_changes_nothing_but_rounding(mode, recompute, n_embd):
    script = """
import os, torch, train
leave = os._exit

def note(status):
    with open(f"graphs-{os.environ['RANK']}", "w") as f:
        f.write(str(torch._dynamo.utils.counters["stats"]["unique_graphs"]))
    leave(status)
os._exit = note
train.launch.run(train.main)
"""
    shape = [*LONGER, f"--n_embd={n_embd}", "--max_iters=10", "--learning_rate=3e-4"]
    flags = [*shape, *recompute, *(["--fsdp"] if mode == "fsdp" else [])]
    process = torchrun(script, *flags, "--compile=True", n=1 if mode == "alone" else 2)
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0 and "torch.compile: the first steps" in out, err
    assert int(Path("graphs-0").read_text()) > 1   # besides the one that only looks whether there is a compiler
    train.main([*shape, "--out_dir=plain"])
    same_course(Path("out"), Path("plain"), rel=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers and sampling

@pytest.mark.parametrize("text", ["", "Hello world", "naïve café 😀\n\ttab", " leading", "日本語"])
def test_tokenizers_give_back_the_text(text, gpt2_tokenizer):
    for tokenizer in (gpt2_tokenizer, Tokenizer({"kind": "char", "chars": "".join(sorted(set(text)))})):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sample_streams_prompt_and_text_and_reports_speed(capsys):
    train.main(TINY)
    capsys.readouterr()
    sample.main(["--out_dir=out", "--prompt=the cat", "--max_new_tokens=20", "--num_samples=2", "--top_k=5", "--top_p=0.9", "--device=cpu"])
    out, err = capsys.readouterr()
    first, second = out.split("-" * 80 + "\n")
    assert first.startswith("the cat") and len(first) == len(second) == len("the cat") + 20 + 1 and first != second
    assert err.splitlines()[-1].startswith("40 tokens in ") and "tokens/s" in err


def test_sample_is_repeatable_and_greedy_ignores_the_seed(capsys):
    train.main(TINY)
    def text(*flags):
        capsys.readouterr()
        sample.main(["--out_dir=out", "--max_new_tokens=30", "--device=cpu", *flags])
        return capsys.readouterr().out
    assert text("--seed=1") == text("--seed=1") != text("--seed=2")
    assert text("--seed=1", "--temperature=0") == text("--seed=2", "--temperature=0")


@pytest.mark.parametrize("really", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("bias", [False, True])
def test_compiled_products_give_the_same_logits(really, bias, monkeypatch):
    if not really:   # the arithmetic without the wait for a compiler
        monkeypatch.setattr(torch, "compile", lambda f, **options: f)
    torch.manual_seed(0)
    for B in (1, 2):
        model = GPT(GPTConfig(32, 50, 2, 4, 32, bias=bias, use_gqa=True, n_kv_head=2)).eval()
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.1)
        idx = torch.randint(50, (B, 12))
        with torch.no_grad():
            whole = model(idx)[0]
            sample.compile_products(model)
            cache = model.new_cache(B)
            chunks = [model(chunk, cache=cache)[0] for chunk in idx.split((6, 1, 1, 3, 1), dim=1)]
        torch.testing.assert_close(torch.cat(chunks, dim=1), whole, rtol=1e-5, atol=1e-5)


def test_compile_is_used_or_says_why_not(capsys, monkeypatch):
    train.main(TINY)
    flags, calls = ["--out_dir=out", "--max_new_tokens=5", "--device=cpu", "--compile"], []
    monkeypatch.setattr(sample, "compile_products", calls.append)
    monkeypatch.setattr(sample, "why_no_compiler", lambda device: None)
    sample.main(flags)
    assert len(calls) == 1
    monkeypatch.setattr(sample, "why_no_compiler", lambda device: "no compiler here")
    sample.main(flags)
    assert len(calls) == 1 and "torch.compile failed, going on without it: no compiler here" in capsys.readouterr().err


def test_prompt_from_a_file_and_a_prompt_with_equal_signs(capsys):
    train.main(TINY)
    Path("p.txt").write_text("the dog\n", newline="")
    capsys.readouterr()
    sample.main(["--out_dir=out", "--prompt_file=p.txt", "--max_new_tokens=5", "--device=cpu"])
    assert capsys.readouterr().out.startswith("the dog\n")


def test_character_of_several_tokens_is_shown_whole(capsys, monkeypatch, gpt2_tokenizer):
    """Every piece of output is text that stays: no half character that would be mended later."""
    text = "😀é日本"
    ids = gpt2_tokenizer.encode(text)
    assert len(ids) > len(text)
    monkeypatch.setattr(sample, "load", lambda *a: (GPT(GPTConfig(8, 50257, 1, 2, 16)).eval(), gpt2_tokenizer))
    monkeypatch.setattr(GPT, "stream", lambda *a: iter(torch.tensor(ids).view(-1, 1, 1)))
    pieces = []
    monkeypatch.setattr("builtins.print", lambda *a, **k: pieces.append("".join(a)) if "file" not in k else None)
    sample.main(["--device=cpu"])
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("argv, match", [
    (["--prompt=Quetzal"], "does not know the character"), (["--prompt="], "empty prompt"), (["--prompt_file=none.txt"], "none.txt"),
    (["--prompt_file=latin.txt"], "latin.txt is not UTF-8"), (["--prompt=a", "--prompt_file=text.txt"], "not both"),
    (["--temperature=-0.5"], "temperature=-0.5"), (["--top_k=0"], "top_k=0"), (["--top_p=0"], "top_p=0"), (["--top_p=1.5"], "top_p=1.5"),
    (["--seed=-1"], "seed=-1"), (["--device=meta"], "device=meta"), (["--num_samples=0"], "num_samples=0"), (["--max_new_tokens=0"], "max_new_tokens=0"), (["--out_dir=nowhere"], "nowhere holds no best.pt"),
    (["--init_from=nowhere"], "nowhere: not one of"), (["--device=tpu9"], "device=tpu9")])
def test_bad_sampling_input_is_one_clear_line(argv, match):
    train.main(TINY)
    Path("latin.txt").write_bytes("caf\u00e9!".encode("latin1"))
    fails(sample, "--device=cpu", *argv, match=match)
