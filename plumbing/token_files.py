"""
A prepared dataset: a folder with files of token ids and meta.json, which describes them.
prepare_data.py writes it, train.py reads its training sequences from it.
"""

from pathlib import Path

import numpy as np
import torch

from plumbing.downloads import DownloadError
from plumbing.errors import InputError
from plumbing.json_files import read_json, write_json
from plumbing.tokenizer import Tokenizer, same_tokenizer

PREPARE_AGAIN = "prepare it again with prepare_data.py"


def write_meta(folder, tokenizer, dtype, files, digest, header_bytes=0):
    """
    Write meta.json, last of all: a folder that has it is complete.

    dtype          of the ids in the files
    files          {"train": {name: number of tokens}, "val": the same}
    digest         the sha256 of the source, or None
    header_bytes   to skip at the beginning of every file
    """
    meta = {
        "tokenizer": tokenizer.spec,
        "vocab_size": tokenizer.vocab_size,
        "dtype": np.dtype(dtype).name,
        "header_bytes": header_bytes,
        "train": files["train"],
        "val": files["val"],
        "source_sha256": digest,
    }
    write_json(folder / "meta.json", meta)
    train_tokens = sum(files["train"].values())
    val_tokens = sum(files["val"].values())
    print(f"{folder}: {train_tokens:,} training and {val_tokens:,} validation tokens, "
          f"vocabulary {tokenizer.vocab_size:,}")


def load_meta(folder):
    """The contents of meta.json, checked against the files beside it; InputError if they differ."""
    path = Path(folder) / "meta.json"
    try:
        meta = read_json(path)
    except InputError as e:
        raise InputError(f"{e}: {PREPARE_AGAIN}") from None
    if meta is None:
        raise InputError(f"{path} is missing: {PREPARE_AGAIN}")
    try:
        tokenizer_size = Tokenizer(meta["tokenizer"]).vocab_size
        sizes = sizes_in_bytes(meta)
    except DownloadError:   # of the GPT-2 tokenizer
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(f"{path} is broken ({e!r:.100}): {PREPARE_AGAIN}") from None
    if meta["vocab_size"] != tokenizer_size:
        raise InputError(
            f"{path}: vocab_size={meta['vocab_size']}, but its tokenizer has {tokenizer_size} ids: "
            f"{PREPARE_AGAIN}"
        )
    for file, expected in sizes.items():
        check_size(path.parent / file, expected)
    return meta


def sizes_in_bytes(meta):
    """{name of a file: bytes it must have}; any of several errors if meta is broken"""
    vocab_size = meta["vocab_size"]
    header_bytes = meta["header_bytes"]
    if type(vocab_size) is not int or type(header_bytes) is not int or header_bytes < 0:
        raise ValueError(f"vocab_size={vocab_size!r}, header_bytes={header_bytes!r}")
    bytes_per_token = {"uint16": 2, "uint32": 4}[meta["dtype"]]
    sizes = {}
    for file, tokens in [*meta["train"].items(), *meta["val"].items()]:
        if Path(file).name != file or type(tokens) is not int or tokens < 0 or file in sizes:
            raise ValueError(f"{file!r} with {tokens!r} tokens")
        sizes[file] = header_bytes + tokens * bytes_per_token
    return sizes


def check_size(path, expected):
    if not path.exists():
        raise InputError(f"{path} is missing: {PREPARE_AGAIN}")
    size = path.stat().st_size
    if size != expected:
        raise InputError(
            f"{path} has {size:,} bytes, its tokens take {expected:,}: {PREPARE_AGAIN}"
        )


def check_tokenizer(spec, vocab_size, meta, weights):
    """
    InputError if trained weights had another tokenizer than the data in meta. spec and vocab_size
    are those of the weights, whose name is for the error; spec None: it is not known
    """
    if spec is not None and not same_tokenizer(spec, meta["tokenizer"]):
        raise InputError(
            f"{weights} was trained with another tokenizer than the dataset has, so the same ids "
            "mean other text: prepare the data with its tokenizer, prepare_data.py --input FILE "
            f"--name NAME --tokenizer {weights}"
        )
    if spec is None and meta["tokenizer"]["kind"] == "char" and vocab_size != meta["vocab_size"]:
        raise InputError(
            f"{weights} has {vocab_size} ids and the dataset {meta['vocab_size']} characters: they "
            "cannot mean the same text"
        )


class Data:
    """
    One split of a prepared dataset as n sequences of block_size+1 tokens: block_size inputs, each
    with the token that follows it. A sequence is read from its file when it is asked for, so memory
    does not grow with the data. (Not by a memory map: if the file is truncated during the run, the
    process dies without a message.)
    """

    def __init__(self, folder, meta, split, block_size, seed):
        self.folder = folder
        self.block_size = block_size
        self.seed = seed
        self.epoch = None   # of which order and shift are known
        self.files = list(meta[split].items())   # [(name, number of tokens)]
        self.opened = {}                         # name: file, once it is needed
        self.dtype = np.dtype(meta["dtype"])
        self.vocab_size = meta["vocab_size"]
        self.header_bytes = meta["header_bytes"]
        # A sequence ends with the first token of the next one: the last one needs a token more.
        sequences_per_file = [max(0, tokens - 1) // block_size for _, tokens in self.files]
        self.first_sequence = np.cumsum([0] + sequences_per_file)   # of every file, and the total
        self.n = int(self.first_sequence[-1])
        if self.n == 0:
            tokens = sum(meta[split].values())
            raise InputError(
                f"{folder}: the {split} split has {tokens:,} tokens, and one sequence of "
                f"block_size={block_size} needs {block_size + 1}: use more text or a smaller "
                "block_size"
            )

    def batch(self, numbers):
        """
        The training sequences with these numbers, counted from the start of training: x, y as in
        sequences(). Every epoch visits each sequence once, in an order and with a shift of its own.
        Both depend on seed and epoch alone, so a resumed run has no state to restore.
        """
        indices = []
        shifts = []
        for number in numbers:
            epoch, place = divmod(number, self.n)
            if epoch != self.epoch:
                rng = np.random.default_rng([self.seed, epoch])
                self.epoch = epoch
                self.order = rng.permutation(self.n)
                self.shift = rng.random()
            indices.append(self.order[place])
            shifts.append(self.shift)
        return self.sequences(indices, shifts)

    def sequences(self, indices, shifts=None):
        """x, y: (len(indices), block_size) int64, where y is x one token later."""
        if shifts is None:
            shifts = [0.0] * len(indices)
        ids = np.stack([self.sequence(i, s) for i, s in zip(indices, shifts, strict=True)])
        ids = torch.from_numpy(ids.astype(np.int64))
        # Copies, because only contiguous tensors go from pinned memory to a GPU in the background.
        return ids[:, :-1].clone(), ids[:, 1:].clone()

    def sequence(self, i, shift=0.0):
        """
        Sequence i as block_size+1 ids. shift, a fraction of its file, moves it along that file,
        whose end is followed by its beginning.
        """
        file = int(np.searchsorted(self.first_sequence, i, side="right")) - 1
        name, tokens = self.files[file]
        start = (i - self.first_sequence[file]) * self.block_size + int(shift * tokens)
        start = int(start % tokens)
        end = start + self.block_size + 1
        ids = self.read(name, start, min(end, tokens))
        if end > tokens:
            ids = np.append(ids, self.read(name, 0, end - tokens))
        if ids.max() >= self.vocab_size:   # on a GPU this would be a read out of range
            raise InputError(
                f"{self.folder / name} holds the id {ids.max()}, its vocabulary ends at "
                f"{self.vocab_size - 1}: {PREPARE_AGAIN}"
            )
        return ids

    def read(self, name, start, end):
        """The ids of a file from start to end"""
        if name not in self.opened:
            self.opened[name] = open(self.folder / name, "rb", buffering=0)
        size = (end - start) * self.dtype.itemsize
        self.opened[name].seek(self.header_bytes + start * self.dtype.itemsize)
        raw = self.opened[name].read(size)
        if len(raw) < size:
            raise InputError(f"{self.folder / name} has become shorter: {PREPARE_AGAIN}")
        return np.frombuffer(raw, self.dtype)
