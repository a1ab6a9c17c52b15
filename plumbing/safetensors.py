"""
The safetensors format, which holds tensors and nothing that could run code.

A file is 8 bytes with the length of the header, the header as JSON, and the tensors' raw bytes one
after the other: https://huggingface.co/docs/safetensors. The header is a stranger's: nothing in it
is used before it is checked.
"""

import json
import math
import os

import torch

from plumbing.errors import InputError, first_line
from plumbing.files import replacing

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
LONGEST_HEADER = 100_000_000


def read_safetensors(path):
    """All tensors of the file, {name: tensor}. Raises InputError if it is damaged or forged."""
    try:
        with open(path, "rb") as f:
            header = read_header(f, os.path.getsize(path))
            return {name: read_tensor(f, name, entry) for name, entry in header}
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as e:
        raise InputError(
            f"{path} cannot be read as safetensors: {first_line(e)}; if it is damaged, delete it "
            "and fetch it again"
        ) from None


def read_header(f, file_size):
    """The header's (name, entry) pairs in the order of their bytes, which fill the file exactly."""
    length = int.from_bytes(f.read(8), "little")
    if not 2 <= length <= min(file_size - 8, LONGEST_HEADER):
        raise ValueError(f"a header of {length:,} bytes in a file of {file_size:,}")
    header = json.loads(f.read(length))
    header.pop("__metadata__", None)
    in_order = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    end = 0
    for name, entry in in_order:
        start, stop = entry["data_offsets"]
        if start != end:   # a gap or an overlap
            raise ValueError(f"{name} begins at byte {start}, the tensor before it ends at {end}")
        if stop - start != size_in_bytes(name, entry):
            raise ValueError(f"{name}, {entry['dtype']} of shape {entry['shape']}, cannot take "
                             f"bytes {start} to {stop}")
        end = stop
    if 8 + length + end != file_size:
        raise ValueError(f"the tensors end at byte {8 + length + end:,} of {file_size:,}")
    return in_order


def size_in_bytes(name, entry):
    """What a tensor of this dtype and shape takes."""
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{name} has dtype {entry['dtype']}, which is none of {', '.join(DTYPES)}")
    if any(type(n) is not int or n < 0 for n in entry["shape"]):
        raise ValueError(f"{name} has shape {entry['shape']}")
    return math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize


def read_tensor(f, name, entry):
    """The tensor whose bytes come next in f."""
    dtype = DTYPES[entry["dtype"]]
    raw = bytearray(f.read(size_in_bytes(name, entry)))   # a bytearray, for tensors are writable
    if not raw:   # which frombuffer refuses
        return torch.empty(entry["shape"], dtype=dtype)
    return torch.frombuffer(raw, dtype=dtype).view(entry["shape"])


def write_safetensors(path, tensors):
    """Write {name: tensor} as float32. The file changes completely or not at all."""
    header = {"__metadata__": {"format": "pt"}}   # transformers requires this entry
    end = 0
    for name, tensor in tensors.items():
        start = end
        end = start + 4 * tensor.numel()
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)   # tensors begin at a multiple of 8 bytes
    with replacing(path) as f:
        f.write(len(text).to_bytes(8, "little"))
        f.write(text)
        for tensor in tensors.values():
            f.write(tensor.to("cpu", torch.float32).contiguous().numpy().data)
