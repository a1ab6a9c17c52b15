"""
The safetensors format. The authority is the safetensors library: we read what it writes, it reads
what we write, and a file that is not whole and honest is refused with one clear line.
"""

import json
import struct

import pytest
import safetensors.torch
import torch

from plumbing.errors import InputError
from plumbing.safetensors import DTYPES, read_safetensors, write_safetensors

FILE = "t.safetensors"


def test_reads_every_dtype_that_the_library_writes(tmp_path):
    tensors = {name: (torch.randn(3, 5) * 9).to(dtype) for name, dtype in DTYPES.items()}
    tensors["scalar"] = torch.tensor(2.5)
    tensors["empty"] = torch.empty(0, 4)
    safetensors.torch.save_file(tensors, tmp_path / FILE, {"note": "to be ignored"})
    ours = read_safetensors(tmp_path / FILE)
    assert ours.keys() == tensors.keys()
    for name, t in tensors.items():
        assert ours[name].dtype == t.dtype, name
        assert torch.equal(ours[name], t), name


def test_library_reads_what_we_write(tmp_path):
    tensors = {
        "matrix": torch.randn(3, 5),
        "transposed": torch.randn(4, 2).t(),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "half": torch.randn(7).bfloat16(),
    }
    write_safetensors(tmp_path / FILE, tensors)
    theirs = safetensors.torch.load_file(tmp_path / FILE)
    assert theirs.keys() == tensors.keys()
    for name, t in tensors.items():
        assert theirs[name].dtype == torch.float32, name
        assert torch.equal(theirs[name], t.float()), name


@pytest.mark.filterwarnings("error")   # torch warns of a tensor in memory that is read-only
def test_tensors_that_are_read_can_be_written_to(tmp_path):
    write_safetensors(tmp_path / FILE, {"a": torch.zeros(3)})
    read = read_safetensors(tmp_path / FILE)["a"]
    read += 1
    assert torch.equal(read, torch.ones(3))
    assert torch.equal(read_safetensors(tmp_path / FILE)["a"], torch.zeros(3))


def test_write_that_fails_leaves_the_previous_file_whole(tmp_path):
    write_safetensors(tmp_path / FILE, {"a": torch.ones(2)})
    with pytest.raises(NotImplementedError):
        unwritable = torch.ones(2, device="meta")
        write_safetensors(tmp_path / FILE, {"a": torch.zeros(2), "b": unwritable})
    assert torch.equal(read_safetensors(tmp_path / FILE)["a"], torch.ones(2))
    assert [path.name for path in tmp_path.glob("t.*")] == [FILE]


# ------------------------------------------------------------------------------------------------
# Forgeries, each one change away from a file that is read

A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
B = {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}
HONEST = {"a": A, "b": B}
HUGE = {"dtype": "F32", "shape": [0, 1 << 70], "data_offsets": [16, 16]}


def file_of(header, data=b"\0" * 16, length=None):
    """The bytes of a file; header is bytes or what becomes JSON, length is what it claims to be."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    if length is None:
        length = len(text)
    return struct.pack("<Q", length) + text + data


def with_a(**changes):
    return file_of({"a": A | changes, "b": B})


def with_b(data=b"\0" * 16, **changes):
    return file_of({"a": A, "b": B | changes}, data)


FORGERIES = {
    "empty": b"",
    "shorter than the length of a header": b"1234567",
    "huge header": file_of(HONEST, length=2**63),
    "header past the end": file_of(HONEST, length=10_000),
    "header cut off": file_of(HONEST, length=5),
    "header not JSON": file_of(b"not json"),
    "header not UTF-8": file_of(b"\xff\xfe{}"),
    "header nested deeply": file_of(b"[" * 50_000),
    "header a list": file_of([1, 2]),
    "entry a number": file_of({"a": 1}),
    "entry without shape": file_of({"a": {"dtype": "F32", "data_offsets": [0, 8]}, "b": B}),
    "entry without offsets": file_of({"a": {"dtype": "F32", "shape": [2]}, "b": B}),
    "bytes that belong to no tensor": file_of({"a": A}),
    "one byte missing": file_of(HONEST, data=b"\0" * 15),
    "one byte too many": file_of(HONEST, data=b"\0" * 17),
    "two tensors in one place": with_b(data_offsets=[0, 8]),
    "two tensors overlap": with_b(data_offsets=[4, 12]),
    "a gap": with_b(data_offsets=[16, 24], data=b"\0" * 24),
    "out of range": with_b(data_offsets=[8, 1 << 40], shape=[1 << 38]),
    "negative offset": with_a(data_offsets=[-8, 0]),
    "backwards": with_a(data_offsets=[8, 0]),
    "one offset": with_a(data_offsets=[0]),
    "three offsets": with_a(data_offsets=[0, 8, 8]),
    "offsets a string": with_a(data_offsets="ab"),
    "offsets null": with_a(data_offsets=None),
    "shape too large": with_a(shape=[3]),
    "negative shape": with_a(shape=[-1, -2]),
    "shape of floats": with_a(shape=[2.0]),
    "shape of booleans": with_a(shape=[True, 2]),
    "shape a number": with_a(shape=2),
    "shape past 64 bits": file_of(HONEST | {"huge": HUGE}),
    "another dtype": with_a(dtype="F64"),
    "unknown dtype": with_a(dtype="F33"),
    "dtype a list": with_a(dtype=["F32"]),
}


@pytest.mark.parametrize("raw", FORGERIES.values(), ids=FORGERIES.keys())
def test_forged_safetensors_file_is_refused(tmp_path, raw):
    (tmp_path / FILE).write_bytes(raw)
    with pytest.raises(InputError, match=f"{FILE} cannot be read as safetensors") as refusal:
        read_safetensors(tmp_path / FILE)
    assert "\n" not in str(refusal.value)


def test_what_the_forgeries_change_is_read(tmp_path):
    (tmp_path / FILE).write_bytes(file_of(HONEST))
    assert read_safetensors(tmp_path / FILE).keys() == {"a", "b"}
