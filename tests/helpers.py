"""What the tests share: a tiny run, ways to start a script, and ways to look at what it left."""

import csv
import hashlib
import http.server
import io
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from plumbing.errors import run_script
from prepare_data import prepare_text

HERE = Path(__file__).resolve().parents[1]
PROGRAMS = HERE / "tests" / "programs"
SHAKESPEARE_TEXT = HERE / "data" / "shakespeare" / "input.txt"

LINES = "the cat sat on the mat.\nthe dog sat on the log.\nwho sat on the cat?\n"   # 17 characters
TINY = [
    "--dataset=tiny", "--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=8",
    "--batch_size=4", "--max_iters=12", "--warmup_iters=2", "--learning_rate=1e-2",
    "--eval_interval=6", "--eval_iters=3", "--log_interval=3",
    "--device=cpu", "--dtype=float32", "--compile=False",
]
SWITCHES = ["--use_rope", "--use_gqa", "--n_kv_head=1", "--use_swa", "--window_size=3"]
LONGER = [
    *TINY, *SWITCHES, "--batch_size=12", "--max_iters=20", "--lr_decay_iters=20",
    "--learning_rate=3e-3", "--eval_interval=10", "--log_interval=1",
]

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
needs_full_disk = pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
needs_shakespeare = pytest.mark.skipif(
    not SHAKESPEARE_TEXT.exists(), reason="data/shakespeare/input.txt is not here")


def prepare_tiny():
    """text.txt and the dataset tiny, in the current folder"""
    Path("text.txt").write_text(LINES * 40, encoding="utf-8", newline="")
    prepare_text(Path("data/tiny"), ["text.txt"], "char")


def without(flags, *names):
    """The flags, except those of these settings"""
    return [flag for flag in flags if not flag.startswith(tuple(f"--{name}=" for name in names))]


# ------------------------------------------------------------------------------------------------
# What a run left

def checkpoint(path="out/ckpt.pt"):
    return torch.load(path, weights_only=True)


def rows(path="out/metrics.csv"):
    """metrics.csv as a list of dicts of text"""
    with open(path, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def val_losses(path="out/metrics.csv"):
    return [float(row["val_loss"]) for row in rows(path) if row["val_loss"]]


def ids(split, folder="data/tiny", dtype=np.uint16):
    return np.fromfile(Path(folder) / f"{split}.bin", dtype=dtype).tolist()


def same_weights(a, b):
    """Two checkpoints hold the same tensors, to the bit."""
    if a["model"].keys() != b["model"].keys():
        return False
    return all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])


def same_state(a, b):
    """Two folders of runs end in the same weights and the same optimizer state, to the bit."""
    a = checkpoint(a / "ckpt.pt")
    b = checkpoint(b / "ckpt.pt")
    if not same_weights(a, b) or a["optimizer"].keys() != b["optimizer"].keys():
        return False
    for name, state in a["optimizer"].items():
        if state.keys() != b["optimizer"][name].keys():
            return False
        if not all(torch.equal(state[key], b["optimizer"][name][key]) for key in state):
            return False
    return True


def same_course(a, b, after=0, rel=1e-5):
    """Two folders of runs printed the same losses, gradient norms and learning rates."""
    first = [row for row in rows(a / "metrics.csv") if int(row["step"]) > after]
    second = [row for row in rows(b / "metrics.csv") if int(row["step"]) > after]
    assert len(first) == len(second) > 10
    for x, y in zip(first, second, strict=True):
        for key in ("step", "train_loss", "val_loss", "grad_norm", "lr"):
            where = (a.name, b.name, x["step"], key)
            assert x[key] == y[key] or float(x[key]) == pytest.approx(float(y[key]), rel), where


# ------------------------------------------------------------------------------------------------
# Starting scripts

def fails(script, *argv, match):
    """
    Run a script's main as its command line does. It must exit with status 1, without a traceback,
    and the last line on stderr, which is returned, must match.
    """
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(sys, "argv", [script.__name__, *map(str, argv)])
        patch.setattr(sys, "stderr", err)
        run_script(script.main)
    err.seek(0)
    text = err.read()
    assert caught.value.code == 1 and "Traceback" not in text, text
    line = text.splitlines()[-1]
    assert re.search(match, line), text
    return line


def start(*argv, script="train.py"):
    """Start a script as a process of its own."""
    return open_process([sys.executable, str(HERE / script), *argv])


def needs_loopback():
    """Skip where a process cannot reach its own machine: under `unshare -n`, for example."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        try:
            socket.create_connection(listener.getsockname(), timeout=5).close()
        except OSError:
            pytest.skip("the loopback interface is down: ip link set lo up")


def torchrun(script, *argv, n=2, options=("--standalone",), cwd=None):
    """Start a script in n processes, as a user would."""
    needs_loopback()
    command = [sys.executable, "-m", "torch.distributed.run", *options, f"--nproc_per_node={n}"]
    return open_process([*command, str(script), *argv], cwd)


def start_machines(script, *argv, n, folders=(".", ".")):
    """Two launches of torchrun, which meet as two machines of n processes each, to their ends."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    options = ("--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}",
               "--rdzv_id=7")
    both = [torchrun(script, *argv, n=n, options=options, cwd=folder) for folder in folders]
    for process in both:
        process.out = finish(process)[0]
    return both


def open_process(command, cwd=None):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env,
                            cwd=cwd, text=True, encoding="utf-8")


def finish(process, timeout=200):
    """
    Wait for torchrun -> stdout, the lines on stderr that are ours. torchrun adds lines of its own
    and, after a failure, a traceback of itself; there must never be a traceback of ours. Without a
    network its C++ warns too, about names of hosts: such lines begin with "[W1125 ".
    """
    out, process.err = process.communicate(timeout=timeout)
    ours, *traceback = process.err.split("Traceback (most recent call last)")
    assert len(traceback) == (process.returncode != 0), process.err
    return out, [line for line in ours.splitlines() if not re.match(r"\[?[WE]\d{4} ", line)]


def fails_at_once(process, match):
    """All processes end; one of them says why in one line, which torchrun names as the cause."""
    _, ours = finish(process)
    assert process.returncode == 1 and len(ours) == 1, process.err
    assert re.search(match, ours[0]), ours
    assert f"traceback : {ours[0]}" in process.err.split("Root Cause")[1]


def workers(process):
    """The process ids of the workers that torchrun started"""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in children.read_text().split()]


def read_until(process, text):
    while text not in (line := process.stdout.readline()):
        assert line, process.stderr.read()


# ------------------------------------------------------------------------------------------------
# A server to download from

class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files`; `fault` makes it misbehave, `asked` remembers the requests."""
    files = {}
    fault = None   # None, a status such as 500, "cut" (the connection breaks), "slow" (the first
                   # three bytes come alone) or "no ranges"
    cut_after = 300_000   # bytes
    more_headers = {}      # of every answer with a body
    content_range = None   # what it says instead of the truth
    asked = []     # of (path, header Range, header Authorization)

    def do_GET(self):
        headers = self.headers.get("Range"), self.headers.get("Authorization")
        self.asked.append((self.path, *headers))
        body = self.files.get(self.path)
        if body is None:
            self.send_error(404)
        elif isinstance(self.fault, int):
            self.send_error(self.fault)
        elif self.path.startswith("/hub/"):
            self.redirect(body)
        else:
            self.send_body(body)

    def redirect(self, body):
        """As the Hub does for a large file: its hash comes with the redirect to its bytes."""
        self.send_response(302)
        self.send_header("Location", self.path.removeprefix("/hub"))
        self.send_header("X-Linked-Etag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_body(self, body):
        first = 0
        if "Range" in self.headers and self.fault != "no ranges":
            first = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        if first and first >= len(body):
            return self.send_error(416)
        self.send_response(206 if first else 200)
        if first:
            truth = f"bytes {first}-{len(body) - 1}/{len(body)}"
            said = truth if self.content_range is None else self.content_range
            self.send_header("Content-Range", said)
        for name, value in self.more_headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) - first))
        self.end_headers()
        last = first + self.cut_after if self.fault == "cut" else len(body)
        while self.fault == "slow" and first < 3:
            self.wfile.write(body[first:first + 1])
            first += 1
            time.sleep(0.8)
        self.wfile.write(body[first:last])
        self.close_connection = True

    def log_message(self, *args):
        pass


def digest(path):
    """The sha256 of one of the server's files"""
    return hashlib.sha256(Server.files[path]).hexdigest()
