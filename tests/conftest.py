"""Fixtures of all tests in this folder."""

import http.server
import os
import sys
import sysconfig
import threading
from pathlib import Path

import pytest
import torch
from every_mode import train_every_mode
from helpers import Server, needs_loopback, prepare_tiny

from model import GPT
from plumbing.errors import InputError
from plumbing.tokenizer import Tokenizer

torch.set_num_threads(1)   # the models are so small that a second thread only slows them down


def pytest_collection_modifyitems(items):
    """The tests that start several processes take most of the time: they run last."""
    items.sort(key=lambda item: item.path.name.startswith("test_several_processes"))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Each test runs in its own folder, with a tiny prepared dataset and no proxy to its server."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "*")
    prepare_tiny()
    return tmp_path


@pytest.fixture(autouse=True)
def no_orphans(home):
    """No test may leave a process behind."""
    yield
    if sys.platform == "linux":
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                inside = Path(os.readlink(folder / "cwd")).is_relative_to(home)
                command = (folder / "cmdline").read_bytes()
            except OSError:   # it has just ended, or is not ours
                continue
            assert not inside or int(folder.name) == os.getpid(), command


@pytest.fixture
def short_sample(monkeypatch):
    """The sample at the end of a run has 8 tokens: 256 would take longer than a tiny run."""
    generate = GPT.generate

    def generate_few(self, idx, max_new_tokens, *args, **options):
        return generate(self, idx, min(max_new_tokens, 8), *args, **options)
    monkeypatch.setattr(GPT, "generate", generate_few)


@pytest.fixture
def gpt2_tokenizer():
    try:
        return Tokenizer({"kind": "gpt2"})
    except InputError:
        pytest.skip("the GPT-2 tokenizer is not on this machine (set TIKTOKEN_CACHE_DIR)")


@pytest.fixture
def server():
    """The address of a server of our own, which helpers.Server describes"""
    needs_loopback()
    Server.files = {"/f": bytes(range(256)) * 4000}
    Server.fault = None
    Server.cut_after = 300_000
    Server.more_headers = {}
    Server.content_range = None
    Server.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


@pytest.fixture
def library(monkeypatch):
    """A standard library of two short files, beside others that stdlib leaves out"""
    files = {
        "a.py": "x = 1\n" * 200,
        "sub/b.py": "y = 2\n" * 200,
        "test/c.py": "tested",
        "not_ascii.py": "é" * 99,
        "not_python.txt": "no",
    }
    for name, text in files.items():
        path = Path("lib", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="")
    monkeypatch.setattr(sysconfig, "get_paths", lambda *args, **options: {"stdlib": "lib"})


@pytest.fixture(scope="session", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def modes(request, tmp_path_factory):
    """A folder with one run per mode, of one process and of this many; and their number"""
    folder = tmp_path_factory.mktemp("modes")
    train_every_mode(folder, request.param)
    return folder, request.param
