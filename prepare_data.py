"""
Text in, token files out.

  python prepare_data.py shakespeare              tiny Shakespeare (1.1 MB), one token per character
  python prepare_data.py shakespeare_bpe          the same text in GPT-2's tokens
  python prepare_data.py stdlib                   the Python library on this machine, characters:
                                                  needs no network
  python prepare_data.py fineweb --shards 10      FineWeb in GPT-2's tokens, 100 million per shard
                                                  (200 MB), at most 103 shards
  python prepare_data.py --input a.txt b.txt --tokenizer gpt2 --name mine
                                                  your own text (UTF-8), the first 90% for training;
                                                  --tokenizer char or gpt2, or the name or path of
                                                  weights, for their tokenizer

Each writes a folder data/<name>/: train.bin and val.bin, the token ids one after the other as
uint16 (uint32 for more than 65,536 ids); and meta.json: the tokenizer, the files with their numbers
of tokens, the sha256 of the source. FineWeb's files stay as published, with llm.c's header of 1,024
bytes.

A source that is already there (data/shakespeare/input.txt, data/fineweb/fineweb_train_000001.bin,
...) is verified and used instead of a download.
"""

if __name__ == "__main__":
    import plumbing.ctrl_c  # noqa: F401, before the imports that take seconds

import argparse
import codecs
import difflib
import math
import os
import random
import sysconfig
from pathlib import Path

import numpy as np

from plumbing.downloads import DownloadError, download, hub_url, verify
from plumbing.errors import InputError, run_script
from plumbing.files import need_disk, replacing, sha256
from plumbing.huggingface import load_tokenizer
from plumbing.progress import Progress
from plumbing.token_files import write_meta
from plumbing.tokenizer import Tokenizer, code_points

DATASETS = ("shakespeare", "shakespeare_bpe", "stdlib", "fineweb")
SHAKESPEARE = {
    "url": "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
           "input.txt",
    "sha256": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
}
FINEWEB = "datasets/kjj0/fineweb10B-gpt2/resolve/main"   # on the Hugging Face Hub
FINEWEB_SHARDS = 103
SHARD_TOKENS = 100_000_000
SUBSTITUTE = "stdlib"   # on every machine
SUBSTITUTE_NOTE = (
    "note: tiny Shakespeare is not here and cannot be downloaded, so this run trains on the source "
    "of Python's own library. For Shakespeare, put the text at data/shakespeare/input.txt"
)


def prepare(name, root="data", shards=1):
    """Make the folder root/<name>, where name is one of DATASETS. shards: of fineweb."""
    root = Path(root)
    folder = root / name
    if name not in DATASETS:
        raise unknown_dataset(name, root)
    print(f"preparing {folder}")
    if name == "shakespeare":
        prepare_shakespeare(folder, root / "shakespeare" / "input.txt", "char")
    elif name == "shakespeare_bpe":
        prepare_shakespeare(folder, root / "shakespeare" / "input.txt", "gpt2")
    elif name == "stdlib":
        prepare_stdlib(folder)
    else:
        prepare_fineweb(folder, shards)


def prepare_if_missing(name, tokens):
    """
    prepare() unless data/<name> is there already -> name. tokens: how many a run will train on; no
    more of fineweb is downloaded.
    """
    if not (Path("data") / name / "meta.json").exists():
        shards = math.ceil(tokens / SHARD_TOKENS)
        prepare(name, shards=max(1, min(shards, FINEWEB_SHARDS)))
    return name


def find_dataset(name, tokens, may_substitute, began_on=None):
    """
    prepare_if_missing for train.py, whose first command must work on every machine: if tiny
    Shakespeare is not here and cannot be downloaded, the substitute takes its place.

    may_substitute   False if the user named the dataset on the command line
    began_on         the dataset of a run that is to be resumed: it stays on the substitute
    """
    may_substitute = may_substitute and name == "shakespeare"
    if may_substitute and began_on == SUBSTITUTE:
        return prepare_if_missing(SUBSTITUTE, tokens)
    try:
        return prepare_if_missing(name, tokens)
    except DownloadError:
        if not may_substitute:
            raise
    print(SUBSTITUTE_NOTE)
    return prepare_if_missing(SUBSTITUTE, tokens)


def unknown_dataset(name, root):
    """The error for a name that is not one of DATASETS, with the most similar name there is."""
    if any((root / name).glob("*.bin")):
        return InputError(
            f"{root / name} has .bin files but no meta.json, which says what their ids mean: "
            "docs/your_own_data.md shows how to write it"
        )
    prepared = [path.parent.name for path in root.glob("*/meta.json")]
    similar = difflib.get_close_matches(name, [*DATASETS, *prepared], 1)
    guess = f", did you mean {similar[0]!r}?" if similar else ""
    return InputError(
        f"unknown dataset {name!r}{guess}: there are {', '.join(DATASETS)}; for your own text: "
        f"python prepare_data.py --input FILE --name {name}"
    )


# --------------------------------------------------------------------------------------------------
# One recipe per dataset

def prepare_shakespeare(folder, text, tokenizer_kind):
    """text: the path where the file is expected, and downloaded to if it is missing."""
    if text.exists():
        verify(text, SHAKESPEARE["sha256"], "tiny Shakespeare")
    else:
        download(SHAKESPEARE["url"], text, SHAKESPEARE["sha256"])
    prepare_text(folder, [text], tokenizer_kind)


def prepare_stdlib(folder):
    """The library's ASCII .py files, without tests; shuffled, so that the last 10% are typical."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {
        "test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo",
        "__pycache__",
    }
    paths = []
    for path in sorted(root.rglob("*.py")):
        if skipped.isdisjoint(path.relative_to(root).parts):
            text = path.read_bytes()
            if text and text.isascii():
                paths.append(path)
    if not paths:
        raise InputError(
            f"no Python files in {root}: this Python comes without the source of its library; use "
            "--input with your own text"
        )
    random.Random(1337).shuffle(paths)
    prepare_text(folder, paths, "char")


def prepare_fineweb(folder, shards):
    """The first shards of FineWeb's 10 billion token sample, which is published as token files."""
    if not 1 <= shards <= FINEWEB_SHARDS:
        raise InputError(
            f"--shards={shards}: fineweb has 1 to {FINEWEB_SHARDS} training shards of "
            f"{SHARD_TOKENS:,} tokens"
        )
    val = ["fineweb_val_000000.bin"]
    train = [f"fineweb_train_{i:06d}.bin" for i in range(1, shards + 1)]
    missing = [name for name in val + train if not (folder / name).exists()]
    size = 2 * SHARD_TOKENS * len(missing)
    need_disk(folder, size, f"fineweb with {shards} shard(s)")
    print(f"fineweb: {size / 1e9:.1f} GB to download, {len(missing)} file(s)")
    for name in missing:
        download(hub_url(f"{FINEWEB}/{name}"), folder / name)
    files = {
        "train": {name: tokens_in_shard(folder / name) for name in train},
        "val": {name: tokens_in_shard(folder / name) for name in val},
    }
    write_meta(folder, Tokenizer({"kind": "gpt2"}), np.uint16, files, None, header_bytes=1024)


def tokens_in_shard(path):
    """
    The number of tokens in a file of llm.c: a header of 256 int32 that begins with a magic number,
    the version and the number of tokens; then the tokens as uint16.
    """
    header = np.fromfile(path, dtype="<i4", count=256)
    if len(header) == 256 and header[0] == 20240520 and header[1] == 1:
        tokens = int(header[2])
        if path.stat().st_size == 1024 + 2 * tokens:
            return tokens
    raise InputError(
        f"{path} is not a whole token shard of llm.c: remove it and run the same command again"
    )


def prepare_text(folder, paths, tokenizer_kind):
    """
    Tokenize text files, as if they were one, into folder/train.bin and val.bin. tokenizer_kind:
    char, gpt2, or weights whose tokenizer is to be used, as load_pretrained takes them
    """
    paths = [Path(path) for path in paths]
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path} is not a file: --input takes text files")
        if path.resolve() in [(folder / name).resolve() for name in ("train.bin", "val.bin")]:
            raise InputError(f"{path} would be overwritten: choose another --name")
    size = total_size(paths)
    if size == 0:
        names = ", ".join(str(path) for path in paths)
        raise InputError(f"{names}: empty text, nothing to train on")
    need_disk(folder, 2 * size if tokenizer_kind == "char" else size, "tokenizing")

    if tokenizer_kind == "char":
        tokenizer = character_tokenizer(paths)
        pieces = encode_own_characters(paths, tokenizer)
    else:
        tokenizer = Tokenizer(load_tokenizer(tokenizer_kind))
        pieces = encode_text(paths, tokenizer)
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    tokens = {"train": 0, "val": 0}
    with replacing(folder / "train.bin") as train, replacing(folder / "val.bin") as val:
        for split, ids in pieces:
            file = train if split == "train" else val
            file.write(np.asarray(ids, dtype=dtype).data)
            tokens[split] += len(ids)
        if 0 in tokens.values():
            raise InputError(
                f"{tokens['train']} training and {tokens['val']} validation tokens: this text is "
                "too short to split"
            )
        # An old description must not survive the files that it describes.
        (folder / "meta.json").unlink(missing_ok=True)
    files = {"train": {"train.bin": tokens["train"]}, "val": {"val.bin": tokens["val"]}}
    write_meta(folder, tokenizer, dtype, files, sha256(paths))


# --------------------------------------------------------------------------------------------------
# From text to ids, about a megabyte at a time: texts may be larger than memory

def character_tokenizer(paths):
    """One id per character of the training split: the validation split must not leak into it."""
    seen = np.zeros(0x110000, dtype=bool)   # by code point
    for split, text in split_text(paths, "reading"):
        if split == "train":
            seen[code_points(text)] = True
    chars = "".join(chr(code_point) for code_point in seen.nonzero()[0])
    return Tokenizer({"kind": "char", "chars": chars})


def encode_own_characters(paths, tokenizer):
    """
    Yield the split and the ids of every piece of the text that the tokenizer was made from. The
    validation split may have other characters, which are dropped.
    """
    unknown = 0
    for split, text in split_text(paths, "tokenizing"):
        ids = tokenizer.id_of[code_points(text)]
        known = ids >= 0
        unknown += len(ids) - known.sum()
        yield split, ids[known]
    if unknown:
        print(f"{unknown:,} characters of the validation split do not occur in the training split: "
              "left out")


def encode_text(paths, tokenizer):
    """Yield the split and the ids of every piece of the text: the same as of the whole text."""
    rest = {"train": "", "val": ""}
    for split, text in split_text(paths, "tokenizing"):
        text, rest[split] = cut_at_space(rest[split], text)
        yield split, tokenizer.encode(text)
    for split, text in rest.items():
        yield split, tokenizer.encode(text)


def cut_at_space(rest, text):
    """
    Cut rest + text in two, between a word and the white space after it, which no token crosses.
    rest has no such place: it is what the last call left.
    """
    for i in range(len(text) - 1, -1, -1):
        before = text[i - 1] if i > 0 else rest[-1:]
        if text[i] in " \n\r\t" and not before.isspace():
            return rest + text[:i], text[i:]
    return "", rest + text


def split_text(paths, what):
    """Yield ("train", text) pieces for the first 90% of the bytes, ("val", text) for the rest."""
    left = int(0.9 * total_size(paths))   # training bytes still to come
    for text in read_text(paths, what):
        raw = text.encode()
        train = raw[:left].decode(errors="ignore")   # never half a character
        val = text[len(train):]
        left = max(0, left - len(raw))
        if train:
            yield "train", train
        if val:
            yield "val", val


def read_text(paths, what):
    """Yield the text of the files in pieces. what: names the work for the progress line."""
    progress = Progress(what, total_size(paths))
    done = 0
    for path in paths:
        with open(path, "rb") as f:
            raw_pieces = iter(lambda: f.read(1 << 20), b"")
            try:
                # A character cut by the end of a piece comes whole with the next piece. "-sig":
                # Windows editors may put a byte-order mark in front.
                for text in codecs.iterdecode(raw_pieces, "utf-8-sig"):
                    yield text
                    progress(done + f.tell())
            except UnicodeDecodeError as e:
                position = f.tell() - len(e.object) + e.start
                raise InputError(
                    f"{path} is not UTF-8 text (byte {position:,}): convert it first, for example "
                    "with iconv -f latin1 -t utf-8"
                ) from None
            done += f.tell()


def total_size(paths):
    return sum(os.path.getsize(path) for path in paths)


# --------------------------------------------------------------------------------------------------
# The command line

def main(argv):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python prepare_data.py DATASET | --input FILE... --name NAME (--help for all)",
    )
    parser.add_argument("dataset", nargs="?", help=", ".join(DATASETS))
    parser.add_argument("--shards", type=int, default=1,
                        help="fineweb: the number of training shards (default: 1)")
    parser.add_argument("--input", nargs="+", metavar="FILE", help="text files, UTF-8")
    parser.add_argument("--tokenizer", default="char",
                        help="for --input: char, gpt2, or weights with a tokenizer (default: char)")
    parser.add_argument("--name", help="for --input: the folder in data/")
    args = parser.parse_args(argv)
    if args.dataset and not args.input:
        prepare(args.dataset, shards=args.shards)
    elif args.input and args.name and not args.dataset:
        prepare_text(Path("data") / args.name, args.input, args.tokenizer)
    else:
        parser.error("give a DATASET, or --input FILE... with --name NAME")


if __name__ == "__main__":
    run_script(main)
