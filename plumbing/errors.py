"""Errors: what the user can fix ends as one line, a bug as its whole traceback."""

import json
import os
import re
import signal
import sys
import time
import traceback
from contextlib import contextmanager

import torch
import torch.distributed as dist

from plumbing.files import replacing

NOT_ENOUGH_MEMORY = (
    "error: not enough memory: when training, lower micro_batch_size, block_size or n_embd, or use "
    "--checkpoint_activations or, on several GPUs, --fsdp; when sampling, use --dtype=bfloat16 or "
    "--device=cpu"
)
# how gloo and NCCL say that the other end of a connection is gone
PEER_LOST = "closed by peer|reset by peer|Broken pipe|remote process exited"


class InputError(ValueError):
    """An error the user can fix."""


@contextmanager
def as_input_error():
    """A ValueError raised inside becomes an InputError with the same message."""
    try:
        yield
    except InputError:   # keep subclasses
        raise
    except ValueError as e:
        raise InputError(str(e)) from None


def first_line(e):
    """The first line of an exception's message; torch's often go on for many."""
    try:
        lines = str(e).splitlines()
    except Exception:   # an exception of a config file can do anything
        lines = []
    return lines[0] if lines else ""


def explain(e):
    """An exception -> one line with the problem and the fix, or the whole traceback of a bug."""
    if isinstance(e, (InputError, OSError)):
        # one line, whatever a file that it quotes may hold
        return "error: " + " ".join("".join(c if c.isprintable() else " " for c in str(e)).split())
    if isinstance(e, KeyboardInterrupt):
        return "interrupted"
    out_of_memory = isinstance(e, (MemoryError, torch.OutOfMemoryError))
    if out_of_memory or (isinstance(e, RuntimeError) and "allocate" in str(e)):
        return NOT_ENOUGH_MEMORY
    if "probability tensor contains" in str(e):   # torch.multinomial
        return "error: what the model computes is not finite: its weights are damaged or diverged"
    is_gone = isinstance(e, (dist.DistNetworkError, dist.DistStoreError))
    if is_gone or re.search(PEER_LOST, str(e)):
        return (
            f"error: another process is gone ({first_line(e):.200}); continue from the last "
            "checkpoint with --init_from=auto"
        )
    return "".join(traceback.format_exception(e)).rstrip()


def report(line):
    """Under torchrun: write line where it looks for the cause of a failure, which it then shows."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    extra = {"py_callstack": line, "timestamp": str(int(time.time()))}
    message = {"message": {"message": line, "extraInfo": extra}}
    with replacing(path) as f:   # torchrun may look at any moment, and must not find half a file
        f.write(json.dumps(message).encode())


class Unbreakable:
    """A stream that goes on into nothing when its reader, `head` for example, has ended."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        try:
            return self.stream.write(text)
        except BrokenPipeError:
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self.stream.fileno())
            os.close(nothing)
            return len(text)

    def flush(self):
        self.write("")   # every line has been flushed when it was written

    def __getattr__(self, name):
        return getattr(self.stream, name)


def run_script(main, needs_reader=True):
    """
    main(sys.argv[1:]); an exception is explained on stderr and ends the script with status 1.
    needs_reader: end when nobody reads the output any more
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)   # after ctrl_c.py
    for stream in (sys.stdout, sys.stderr):
        # Without UTF-8 a Windows console lacks characters; without line buffering logs lag behind.
        if hasattr(stream, "reconfigure"):   # a notebook's streams lack it
            stream.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)
    stdout = sys.stdout
    if not needs_reader:
        sys.stdout = Unbreakable(stdout)
    try:
        main(sys.argv[1:])
    except BrokenPipeError:   # `head`, for example, has seen enough
        os._exit(0)
    except (Exception, KeyboardInterrupt) as e:
        line = explain(e)
        report(line)
        print(line, file=sys.stderr)
        sys.exit(1)
    finally:
        sys.stdout = stdout   # a notebook goes on
