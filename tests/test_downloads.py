"""Downloads, from a server of our own: whole and verified, or one clear line."""

import re
import shutil
from pathlib import Path

import pytest
from helpers import LINES, Server, digest, fails

import prepare_data
from model import GPT, GPTConfig
from plumbing.downloads import download
from plumbing.errors import InputError
from prepare_data import SHAKESPEARE, prepare


def test_download_arrives_whole_and_verified(server):
    download(f"{server}/f", "new/folder/f", digest("/f"))
    assert Path("new/folder/f").read_bytes() == Server.files["/f"]
    assert len(list(Path("new/folder").iterdir())) == 1


def test_download_that_breaks_continues_where_it_stopped(server):
    Server.fault = "cut"
    with pytest.raises(InputError, match="run the same command again"):
        download(f"{server}/f", "f", digest("/f"))
    assert not Path("f").exists()
    assert Path("f.part").stat().st_size >= 300_000 - 65536
    Server.fault = None
    download(f"{server}/f", "f", digest("/f"))
    assert Path("f").read_bytes() == Server.files["/f"]
    assert not Path("f.part").exists()
    path, asked_range, token = Server.asked[-1]
    assert asked_range.startswith("bytes=")


def test_server_that_sends_a_byte_a_second_does_not_hide_the_progress(server, capsys):
    Server.fault = "slow"
    download(f"{server}/f", "f", digest("/f"))
    assert Path("f").read_bytes() == Server.files["/f"]
    first_line = capsys.readouterr().err.splitlines()[0]
    assert re.fullmatch(r"downloading f: 0\.0 of 1\.0 MB, [\d,]{6,} s left", first_line)


@pytest.mark.parametrize("fault", ["no ranges", None])
@pytest.mark.parametrize("part", [
    pytest.param(b"", id="empty"),
    pytest.param(b"stale" * 300_000, id="longer than the file"),
])
def test_useless_part_or_a_server_without_ranges_starts_again(server, fault, part):
    Server.fault = fault
    Path("f.part").write_bytes(part)
    download(f"{server}/f", "f", digest("/f"))
    assert Path("f").read_bytes() == Server.files["/f"]


def test_wrong_hash_is_refused_and_the_next_try_starts_anew(server):
    Path("f").write_text("what was there")
    with pytest.raises(InputError, match="wrong sha256"):
        download(f"{server}/f", "f", "0" * 64)
    assert Path("f").read_text() == "what was there"
    assert not Path("f.part").exists()


def test_hash_that_the_hub_sends_is_checked(server):
    Server.files["/hub/f"] = b"another file"
    with pytest.raises(InputError, match="wrong sha256"):
        download(f"{server}/hub/f", "f")
    Server.files["/hub/f"] = Server.files["/f"]
    download(f"{server}/hub/f", "f")
    assert Path("f").read_bytes() == Server.files["/f"]


@pytest.mark.parametrize("path, fault, match", [
    ("/f", 500, "answered 500"),
    ("/f", 403, "answered 403"),
    ("/missing", None, "answered 404"),
])
def test_HTTP_error_is_one_clear_line_and_leaves_nothing(server, path, fault, match):
    Server.fault = fault
    with pytest.raises(InputError, match=match):
        download(server + path, "f")
    assert not list(Path().glob("f*"))


def test_without_network_the_error_names_address_file_and_what_works_without(monkeypatch):
    monkeypatch.setitem(SHAKESPEARE, "url", "http://127.0.0.1:9/input.txt")
    line = fails(prepare_data, "shakespeare", match="no connection could be made")
    assert "http://127.0.0.1:9/input.txt" in line
    assert str(Path("data/shakespeare/input.txt")) in line
    assert "stdlib" in line


def test_shakespeare_is_downloaded_or_taken_from_the_file_that_is_there(server, monkeypatch):
    Server.files["/input.txt"] = (LINES * 99).encode()
    monkeypatch.setitem(SHAKESPEARE, "url", f"{server}/input.txt")
    monkeypatch.setitem(SHAKESPEARE, "sha256", digest("/input.txt"))
    prepare("shakespeare")
    assert len(Server.asked) == 1

    shutil.rmtree("data/shakespeare")
    Path("data/shakespeare").mkdir()
    Path("data/shakespeare/input.txt").write_bytes(Server.files["/input.txt"])
    prepare("shakespeare")
    assert len(Server.asked) == 1 and Path("data/shakespeare/meta.json").exists()


def test_file_that_is_there_but_is_not_shakespeare_is_refused_and_kept():
    Path("data/shakespeare").mkdir()
    Path("data/shakespeare/input.txt").write_text("not Shakespeare")
    fails(prepare_data, "shakespeare", match="wrong sha256")
    assert Path("data/shakespeare/input.txt").read_text() == "not Shakespeare"


def test_released_weights_come_from_HF_ENDPOINT_once(server, monkeypatch):
    GPT(GPTConfig(8, 17, 1, 2, 16)).save_pretrained("made")
    for name in ("config.json", "model.safetensors"):
        address = f"/openai-community/gpt2/resolve/main/{name}"
        Server.files[address] = Path("made", name).read_bytes()
    monkeypatch.setenv("HF_ENDPOINT", f"{server}/")
    Path("gpt2").mkdir()   # an empty folder of that name is in nobody's way
    assert GPT.from_pretrained("gpt2").config.n_embd == 16
    assert GPT.from_pretrained("gpt2").config.n_embd == 16
    assert len(Server.asked) == 2
    kept = sorted(path.name for path in Path("checkpoints/gpt2").iterdir())
    assert kept == ["config.json", "model.safetensors"]


def test_token_is_sent_to_the_hub_alone(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server)
    monkeypatch.setenv("HF_TOKEN", "secret")
    download(f"{server}/f", "f")
    download(f"{server.replace('127.0.0.1', 'localhost')}/f", "g")
    assert [token for path, asked_range, token in Server.asked] == ["Bearer secret", None]


# ------------------------------------------------------------------------------------------------
# What servers send instead

@pytest.mark.parametrize("body, headers, match", [
    (b"<html>log in</html>", {"Content-Type": "text/html; charset=utf-8"}, "a web page instead"),
    (b"", {}, "an empty file"),
    (b"<html>", {}, "no JSON dictionary in it"),
])
def test_other_things_than_the_file_are_refused_and_not_kept(server, body, headers, match):
    Server.files["/config.json"] = body
    Server.more_headers = headers
    with pytest.raises(InputError, match=match):
        download(f"{server}/config.json", "config.json")
    assert not list(Path().glob("config.json*"))


@pytest.mark.parametrize("content_range", ["bytes 0-99/1024000", "", "nonsense"])
def test_other_bytes_than_asked_for_are_refused(server, content_range):
    Path("f.part").write_bytes(Server.files["/f"][:1000])
    Server.content_range = content_range
    with pytest.raises(InputError, match="sent other bytes than asked for"):
        download(f"{server}/f", "f", digest("/f"))
    Server.content_range = None
    download(f"{server}/f", "f", digest("/f"))
    assert Path("f").read_bytes() == Server.files["/f"]
