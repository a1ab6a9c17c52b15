"""
Text in, token files out.

  python prepare_data.py shakespeare              tiny Shakespeare (1.1 MB), one token a character
  python prepare_data.py shakespeare_bpe          the same text, GPT-2's tokens
  python prepare_data.py stdlib                   the Python standard library on this machine, characters: no network
  python prepare_data.py fineweb --shards 10      FineWeb, GPT-2's tokens, 100 million a shard (200 MB), at most 103 shards
  python prepare_data.py --input a.txt b.txt --tokenizer gpt2 --name mine      your own text (UTF-8), 90% to train on

writes data/<name>/: train.bin and val.bin, the token ids as uint16 (uint32 where the vocabulary needs it), one after the
other; and meta.json: the tokenizer, the vocabulary, the files with their token counts, the sha256 of the source.
fineweb's files stay as they are published, with the 1,024-byte header of llm.c. A source that already lies in
data/<name>/ (input.txt, fineweb_train_000001.bin, ...) is verified and used instead of a download.
"""

import argparse
import codecs
import difflib
import hashlib
import json
import os
import random
import shutil
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import requests
import tiktoken
import torch

from launch import run
from model import InputError
from weights import replacing

DATASETS = ("shakespeare", "shakespeare_bpe", "stdlib", "fineweb")
SHAKESPEARE = dict(url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
                   sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")
SHARD_TOKENS = 100_000_000
FINEWEB_SHARDS = 103


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers

class Tokenizer:
    """
    Text <-> token ids. `spec` is plain data, kept in meta.json and in every checkpoint:
    {"kind": "gpt2"}, or {"kind": "char", "chars": "\\n !$&..."} where a character's id is its place in the string.
    """

    def __init__(self, spec):
        if not isinstance(spec, dict) or spec.get("kind") not in ("char", "gpt2"):
            raise InputError(f"unknown tokenizer {spec!r:.100}: expected kind 'char' or 'gpt2'")
        self.spec = spec
        if spec["kind"] == "gpt2":
            self.bpe = gpt2_bpe()
            self.vocab_size, self.start = self.bpe.n_vocab, self.bpe.eot_token   # <|endoftext|> begins a document
        else:
            self.chars = spec["chars"]
            self.ids = np.full(0x110000, -1, dtype=np.int32)   # code point -> id, -1 = unknown
            self.ids[code_points(self.chars)] = np.arange(len(self.chars))
            self.vocab_size, self.start = len(self.chars), max(0, self.chars.find("\n"))

    def encode(self, text):
        """Text -> list of ids; raises ValueError for a character that the tokenizer does not know."""
        if self.spec["kind"] == "gpt2":
            return self.bpe.encode_ordinary(text)
        if unknown := sorted(set(text) - set(self.chars)):
            raise InputError(f"the tokenizer does not know the character(s) {' '.join(map(repr, unknown[:10]))}: it was "
                             f"trained on text without them; it knows {self.chars!r:.200}")
        return self.ids[code_points(text)].tolist()

    def token_bytes(self, token):
        """The UTF-8 bytes of one id. With byte-pair tokens a character may be spread over several ids."""
        return self.bpe.decode_single_token_bytes(token) if self.spec["kind"] == "gpt2" else self.chars[token].encode()

    def decode(self, tokens):
        """Ids -> text; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, tokens)).decode("utf-8", errors="replace")


def gpt2_bpe():
    try:
        return tiktoken.get_encoding("gpt2")
    except requests.RequestException as e:
        raise InputError(f"the GPT-2 tokenizer is not on this machine and {reason(e)}. tiktoken fetches vocab.bpe and encoder.json "
                         "from openaipublic.blob.core.windows.net: run once with a network and TIKTOKEN_CACHE_DIR=<folder>, then "
                         "copy that folder here and set the variable; config/stdlib.py needs none of this") from None


def code_points(text):
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")


# ----------------------------------------------------------------------------------------------------------------------
# Reading and writing, a megabyte at a time: no text is ever held whole

class Progress:
    """A line on stderr for whatever takes longer than two seconds; redrawn on a terminal, else one every ten seconds."""

    def __init__(self, what, total, done=0):
        self.what, self.total, self.first, self.shown = what, total, done, False
        self.start = time.monotonic()
        self.next = self.start + 2

    def __call__(self, done):
        now = time.monotonic()
        if now < self.next and not (self.shown and done == self.total):
            return
        tty = sys.stderr.isatty()
        rate = max(done - self.first, 1) / max(now - self.start, 1e-3)
        left = f" of {self.total / 1e6:,.1f} MB, {(self.total - done) / rate:,.0f} s left" if self.total else " MB"
        print(f"{self.what}: {done / 1e6:,.1f}{left}", end="\r" if tty and done != self.total else "\n", file=sys.stderr, flush=True)
        self.shown, self.next = True, now + (0.5 if tty else 10)


def read_text(paths, what):
    """Yield the text of the files, about a megabyte at a time. A character cut by a piece's end goes to the next one."""
    progress, done = Progress(what, sum(os.path.getsize(p) for p in paths)), 0
    for path in paths:
        decoder = codecs.getincrementaldecoder("utf-8-sig")()   # a mark that Windows put in front is no text
        with open(path, "rb") as f:
            while True:
                raw = f.read(1 << 20)
                try:
                    yield decoder.decode(raw, final=not raw)
                except UnicodeDecodeError as e:
                    raise InputError(f"{path} is not UTF-8 text (byte {f.tell() - len(e.object) + e.start:,}): convert it first, "
                                     f"for example with iconv -f latin1 -t utf-8") from None
                if not raw:
                    break
                done += len(raw)
                progress(done)


def split_text(paths, what):
    """Yield ("train" or "val", text): the first 90% of the bytes train, the rest validates."""
    left = int(0.9 * sum(os.path.getsize(p) for p in paths))
    for text in read_text(paths, what):
        raw = text.encode()
        head = raw[:max(left, 0)].decode(errors="ignore")   # never half a character
        left -= len(raw)
        for split, part in (("train", head), ("val", text[len(head):])):
            if part:
                yield split, part


def cut_at_space(text):
    """Split text in two where byte-pair tokens never cross: between the last word and the white space after it."""
    cut = next((i for i in range(len(text) - 1, 0, -1) if text[i].isspace() and not text[i - 1].isspace()), 0)
    return text[:cut], text[cut:]


def sha256(paths):
    digest = hashlib.sha256()
    progress, done = Progress("sha256", sum(os.path.getsize(p) for p in paths)), 0
    for path in paths:
        with open(path, "rb") as f:
            while raw := f.read(1 << 20):
                digest.update(raw)
                done += len(raw)
                progress(done)
    return digest.hexdigest()


def need_disk(folder, size, what):
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < size:
        raise InputError(f"{what} needs {size / 1e6:,.0f} MB in {folder}, {free / 1e6:,.0f} MB are free: make room first")


# ----------------------------------------------------------------------------------------------------------------------
# Downloads

def hub_url(path):
    """The address of a path on the Hugging Face Hub, or on the mirror that HF_ENDPOINT names."""
    return f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')}/{path}"


def reason(e):
    """The gist of a network error, whose own text is a chain of several lines."""
    return "no connection could be made" if isinstance(e, requests.ConnectionError) else f"the network failed ({type(e).__name__})"


def download(url, path, sha256sum=None):
    """
    Fetch url to path, which appears only when whole and verified. What has arrived waits in <path>.part, and the next
    call goes on from there. sha256sum: the expected hash; without it the one that the Hub sends with large files.
    Raises ValueError with the address, the reason and what to do.
    """
    path = Path(path)
    part = Path(f"{path}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    headers["Accept-Encoding"] = "identity"   # sizes and offsets are those of the file itself
    if url.startswith(hub_url("")) and os.environ.get("HF_TOKEN"):
        headers["Authorization"] = f"Bearer {os.environ['HF_TOKEN']}"   # requests drops it if redirected to another host
    try:
        with requests.get(url, headers=headers, stream=True, timeout=30) as response:
            if response.status_code == 416:   # .part is already as long as the file, or longer: start again
                part.unlink()
                return download(url, path, sha256sum)
            if response.status_code not in (200, 206):
                raise InputError(f"{url} answered {response.status_code} {response.reason}: to go on without it, put the file "
                                 f"at {path} yourself, or use config/stdlib.py, which needs no network")
            if response.status_code == 200:
                have = 0   # the server sends all of it, whatever we asked for
            total = have + int(response.headers.get("Content-Length", 0))
            for answer in (*response.history, response):   # the Hub tells a large file's hash before it redirects
                etag = answer.headers.get("X-Linked-Etag", "").strip('"')
                sha256sum = sha256sum or (etag if len(etag) == 64 else None)
            need_disk(path.parent, total - have, f"downloading {path.name}")
            progress = Progress(f"downloading {path.name}", total, have)
            with open(part, "ab" if have else "wb") as f:
                for piece in response.iter_content(1 << 16):
                    f.write(piece)
                    have += len(piece)
                    progress(have)
    except requests.RequestException as e:
        if part.exists() and part.stat().st_size > 0:
            raise InputError(f"{url}: the connection broke after {part.stat().st_size:,} bytes: run the same command again "
                             f"to go on from there") from None
        raise InputError(f"cannot fetch {url}: {reason(e)}. Put that file at {path} yourself, or use config/stdlib.py, "
                         f"which needs no network") from None
    if total and have != total:
        raise InputError(f"{url}: {have:,} of {total:,} bytes arrived: run the same command again to go on from there")
    verify(part, sha256sum, url)
    os.replace(part, path)


def verify(path, expected, source):
    """Refuse a file whose sha256 is not the expected one; a download that failed is removed so that it can start anew."""
    if expected and (found := sha256([path])) != expected:
        if path.suffix == ".part":
            path.unlink()
        raise InputError(f"{path} has the wrong sha256 {found[:16]}…, expected {expected[:16]}…: it is not what {source} should be; "
                         f"remove it and try again, or give your own text with --input")


# ----------------------------------------------------------------------------------------------------------------------
# Datasets

def prepare_text(folder, paths, kind):
    """Tokenize the files into folder/train.bin and val.bin and write meta.json, last: it says that all is done."""
    paths = [Path(p) for p in paths]
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path} is not a file: --input takes text files")
    size = sum(p.stat().st_size for p in paths)
    if size == 0:
        raise InputError(f"{', '.join(map(str, paths))}: empty text, nothing to train on")
    need_disk(folder, 2 * size if kind == "char" else size, "tokenizing")

    if kind == "char":   # the vocabulary is what the training split holds: validation must not leak into it
        seen = np.zeros(0x110000, dtype=bool)
        for split, text in split_text(paths, "reading"):
            if split == "train":
                seen[code_points(text)] = True
        tokenizer = Tokenizer({"kind": "char", "chars": "".join(map(chr, seen.nonzero()[0]))})
    else:
        tokenizer = Tokenizer({"kind": "gpt2"})
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32

    counts, unknown = {"train": 0, "val": 0}, 0
    with replacing(folder / "train.bin") as train, replacing(folder / "val.bin") as val:
        files, rest = {"train": train, "val": val}, {"train": "", "val": ""}

        def write(split, ids):
            files[split].write(np.asarray(ids, dtype=dtype).data)
            counts[split] += len(ids)

        for split, text in split_text(paths, "tokenizing"):
            if kind == "char":
                ids = tokenizer.ids[code_points(text)]
                unknown += int((ids < 0).sum())
                write(split, ids[ids >= 0])
            else:
                head, rest[split] = cut_at_space(rest[split] + text)
                write(split, tokenizer.encode(head))
        for split in rest:
            write(split, tokenizer.encode(rest[split]))
        if not all(counts.values()):
            raise InputError(f"{counts['train']} training and {counts['val']} validation tokens: this text is too short to split")
    if unknown:
        print(f"{unknown:,} characters of the validation split do not occur in the training split: left out")
    write_meta(folder, tokenizer, dtype, {s: {f"{s}.bin": counts[s]} for s in counts}, sha256(paths))


def write_meta(folder, tokenizer, dtype, files, digest, header_bytes=0):
    meta = dict(tokenizer=tokenizer.spec, vocab_size=tokenizer.vocab_size, dtype=np.dtype(dtype).name,
                header_bytes=header_bytes, train=files["train"], val=files["val"], source_sha256=digest)
    with replacing(folder / "meta.json") as f:
        f.write(json.dumps(meta, indent=1).encode())
    tokens = {split: sum(files[split].values()) for split in ("train", "val")}
    print(f"{folder}: {tokens['train']:,} training and {tokens['val']:,} validation tokens, vocabulary {tokenizer.vocab_size:,}")


def prepare_shakespeare(folder, kind):
    path = next((p for p in (folder / "input.txt", folder.parent / "shakespeare" / "input.txt") if p.exists()), None)
    if path is None:
        path = folder / "input.txt"
        download(SHAKESPEARE["url"], path, SHAKESPEARE["sha256"])
    else:
        verify(path, SHAKESPEARE["sha256"], "tiny Shakespeare")
    prepare_text(folder, [path], kind)


def prepare_stdlib(folder):
    """The .py files of the standard library that are pure ASCII, without tests; shuffled, so that the last 10% are typical."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo", "__pycache__"}
    paths = [p for p in sorted(root.rglob("*.py")) if not skip & set(p.relative_to(root).parts)]
    paths = [p for p in paths if (raw := p.read_bytes()) and raw.isascii()]
    if not paths:
        raise InputError(f"no Python files in {root}: this Python comes without its library's source; use --input with your own text")
    random.Random(1337).shuffle(paths)
    prepare_text(folder, paths, "char")


def prepare_fineweb(folder, shards):
    if not 1 <= shards <= FINEWEB_SHARDS:
        raise InputError(f"--shards={shards}: fineweb has 1 to {FINEWEB_SHARDS} training shards of {SHARD_TOKENS:,} tokens")
    names = ["fineweb_val_000000.bin"] + [f"fineweb_train_{i:06d}.bin" for i in range(1, shards + 1)]
    missing = [n for n in names if not (folder / n).exists()]
    need_disk(folder, 2 * SHARD_TOKENS * len(missing), f"fineweb with {shards} shard(s)")
    files = {"train": {}, "val": {}}
    for name in names:
        if name in missing:
            download(hub_url(f"datasets/kjj0/fineweb10B-gpt2/resolve/main/{name}"), folder / name)
        files["val" if "val" in name else "train"][name] = shard_tokens(folder / name)
    write_meta(folder, Tokenizer({"kind": "gpt2"}), np.uint16, files, None, header_bytes=1024)


def shard_tokens(path):
    """Number of tokens of a shard of llm.c: 256 int32 (magic, version, tokens, zeros), then the tokens as uint16."""
    header = np.fromfile(path, dtype="<i4", count=256)
    if len(header) < 256 or header[0] != 20240520 or header[1] != 1 or path.stat().st_size != 1024 + 2 * int(header[2]):
        raise InputError(f"{path} is not a whole token shard of llm.c: remove it and run the same command again")
    return int(header[2])


def prepare(name, root="data", shards=1):
    """Make data/<name> from one of DATASETS."""
    folder = Path(root) / name
    if name not in DATASETS:
        near = difflib.get_close_matches(name, [*DATASETS, *(p.parent.name for p in Path(root).glob("*/meta.json"))], 1)
        raise InputError(f"unknown dataset {name!r}{f', did you mean {near[0]!r}?' if near else ''}: there are {', '.join(DATASETS)}; "
                         f"your own: python prepare_data.py --input FILE --name {name}")
    print(f"preparing {folder}")
    if name == "fineweb":
        prepare_fineweb(folder, shards)
    elif name == "stdlib":
        prepare_stdlib(folder)
    else:
        prepare_shakespeare(folder, "gpt2" if name == "shakespeare_bpe" else "char")


# ----------------------------------------------------------------------------------------------------------------------
# Reading what was prepared

def load_meta(folder):
    """meta.json of a prepared dataset, checked against the files beside it."""
    path = Path(folder) / "meta.json"
    again = "prepare it again with prepare_data.py"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        tokenizer, dtype = Tokenizer(meta["tokenizer"]), np.dtype(meta["dtype"])
        if meta["vocab_size"] != tokenizer.vocab_size:
            raise InputError(f"{path}: vocab_size={meta['vocab_size']}, but its tokenizer has {tokenizer.vocab_size} ids: {again}")
        for file, tokens in (*meta["train"].items(), *meta["val"].items()):
            size, expected = (path.parent / file).stat().st_size, meta["header_bytes"] + tokens * dtype.itemsize
            if size != expected:
                raise InputError(f"{path.parent / file} has {size:,} bytes, {tokens:,} tokens of {dtype} take {expected:,}: {again}")
    except InputError:
        raise
    except FileNotFoundError as e:
        raise InputError(f"{e.filename} is missing: {again}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(f"{path} is broken ({e!r:.100}): {again}") from None
    return meta


class Data:
    """
    One split of a prepared dataset as windows of block_size+1 tokens: block_size inputs, each with the token that follows.
    Windows are read from the files when they are asked for: memory stays flat whatever the size of the data.
    """

    def __init__(self, folder, meta, split, block_size, seed):
        self.folder, self.block_size, self.seed, self.epoch = folder, block_size, seed, None
        self.files, self.dtype = list(meta[split].items()), np.dtype(meta["dtype"])
        self.vocab_size, self.header_bytes = meta["vocab_size"], meta["header_bytes"]
        # window i covers tokens i*block_size .. (i+1)*block_size of its file, and the one after
        self.first = np.cumsum([0] + [max(0, tokens - 1) // block_size for _, tokens in self.files])
        self.n = int(self.first[-1])   # windows in all
        if self.n == 0:
            raise InputError(f"{folder}: the {split} split has {sum(meta[split].values()):,} tokens, and one sequence of "
                             f"block_size={block_size} needs {block_size + 1}: take more text or a smaller block_size")

    def window(self, i, shift=0.0):
        """Window i as block_size+1 ids; shift, a fraction, moves all windows along their file, which ends where it begins."""
        file = int(np.searchsorted(self.first, i, side="right")) - 1
        name, tokens = self.files[file]
        path, size = self.folder / name, self.dtype.itemsize
        start = ((i - self.first[file]) * self.block_size + int(shift * tokens)) % tokens
        ids = np.fromfile(path, self.dtype, count=self.block_size + 1, offset=self.header_bytes + start * size)
        if len(ids) <= self.block_size:   # over the end: go on from the beginning
            ids = np.append(ids, np.fromfile(path, self.dtype, count=self.block_size + 1 - len(ids), offset=self.header_bytes))
        if ids.max() >= self.vocab_size:   # here, before it becomes an out-of-range read on a GPU
            raise InputError(f"{path} holds the id {ids.max()}, its vocabulary ends at {self.vocab_size - 1}: prepare the dataset again")
        return ids

    def windows(self, indices, shifts=None):
        """x, y: (len(indices), block_size) int64; y is x one token later. Apart and contiguous: only so can pinned copies overlap"""
        ids = np.stack([self.window(i, s) for i, s in zip(indices, shifts or [0.0] * len(indices))])
        ids = torch.from_numpy(ids.astype(np.int64))
        return ids[:, :-1].clone(), ids[:, 1:].clone()

    def batch(self, samples):
        """
        The training sequences with these numbers, counted from the start of training. Each epoch visits every window once,
        in an order and with a shift of its own. All is a function of (seed, number): a resumed run needs no memory of it.
        """
        chosen = []
        for epoch, place in (divmod(sample, self.n) for sample in samples):
            if epoch != self.epoch:
                rng = np.random.default_rng([self.seed, epoch])
                self.epoch, self.order, self.shift = epoch, rng.permutation(self.n), rng.random()
            chosen.append((self.order[place], self.shift))
        return self.windows(*zip(*chosen))


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="python prepare_data.py DATASET | --input FILE... --name NAME (--help for all)")
    parser.add_argument("dataset", nargs="?", help=", ".join(DATASETS))
    parser.add_argument("--shards", type=int, default=1, help="fineweb: how many training shards")
    parser.add_argument("--input", nargs="+", metavar="FILE", help="text files, UTF-8")
    parser.add_argument("--tokenizer", choices=("char", "gpt2"), default="char", help="for --input")
    parser.add_argument("--name", help="for --input: the folder in data/")
    args = parser.parse_args(argv)
    if args.input and args.name and not args.dataset:
        prepare_text(Path("data") / args.name, args.input, args.tokenizer)
    elif args.dataset and not args.input:
        prepare(args.dataset, shards=args.shards)
    else:
        parser.error("give a DATASET, or --input FILE... with --name NAME")


if __name__ == "__main__":
    run(main)
