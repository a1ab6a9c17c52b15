"""Repositories of the Hugging Face Hub, kept in checkpoints/."""

import re
from pathlib import Path

from plumbing.downloads import DownloadError, NotFound, download, hub_url
from plumbing.errors import InputError
from plumbing.json_files import read_json

# Releases that have a short name here, and GPT-2's tokenizer for certain
RELEASES = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")   # owner/name
TOKENIZER_FILES = (
    "tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json",
)
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


def fetch_repository(name):
    """
    The folder checkpoints/<name>, with what load_pretrained reads of this repository. Without a
    word to the Hub if its weights, which come last, are there.

    name     one of RELEASES, or owner/name
    raises   DownloadError
    """
    folder = Path("checkpoints") / name
    repository = RELEASES.get(name, name)

    def fetch(file):
        """Whether the repository has this file; then it is in the folder."""
        if (folder / file).exists():
            return True
        try:
            download(hub_url(f"{repository}/resolve/main/{file}"), folder / file)
        except NotFound:
            return False
        return True

    if is_complete(folder):
        return folder
    try:
        if not fetch("config.json"):
            raise NotFound(f"{hub_url(repository)} has no config.json, or does not exist")
    except DownloadError as e:
        raise DownloadError(f"{name} is not on this machine, and {e}") from None
    if name not in RELEASES:
        for file in TOKENIZER_FILES:
            fetch(file)
    if not any(fetch(file) for file in WEIGHTS):   # the first that it has
        raise InputError(f"{hub_url(repository)} has none of {', '.join(WEIGHTS)}")
    for path in files_of_index(folder / WEIGHTS[1]):
        if not fetch(path.name):
            raise InputError(f"{hub_url(repository)} lacks {path.name}, which its index names")
    return folder


def is_complete(folder):
    """Whether config.json and all weights are there"""
    if not (folder / "config.json").exists():
        return False
    if (folder / WEIGHTS[0]).exists() or (folder / WEIGHTS[2]).exists():
        return True
    parts = files_of_index(folder / WEIGHTS[1])
    return bool(parts) and all(path.exists() for path in parts)


def files_of_index(index):
    """The paths of the files that share the tensors of a large model; [] without an index"""
    data = read_json(index)
    if data is None:
        return []
    weight_map = data.get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:   # "../name" could be any file
            raise InputError(f"{index} is broken: {name!r:.100} names no file beside it")
    return [index.parent / name for name in sorted(set(names))]
