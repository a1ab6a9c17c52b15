"""Repositories of the Hugging Face Hub, kept in checkpoints/."""

import re
from pathlib import Path

from plumbing.architectures import read_config
from plumbing.downloads import DownloadError, NotFound, download, hub_url
from plumbing.errors import InputError
from plumbing.json_files import read_json

# Short names of releases, all with GPT-2's tokenizer
RELEASES = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")   # owner/name
TOKENIZER_FILES = (
    "tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json",
)
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


def fetch_repository(name, weights=True):
    """
    The folder checkpoints/<name>. Files that are missing are downloaded, weights last; if those are
    there, the Hub is not contacted.

    name      one of RELEASES, or owner/name
    weights   False = the configuration and the tokenizer alone
    raises    InputError
    """
    folder = Path("checkpoints") / name
    if is_complete(folder):
        return folder
    repository = RELEASES.get(name, name)
    try:
        found = fetch(repository, "config.json", folder)
    except DownloadError as e:
        raise DownloadError(f"{name} is not on this machine, and {e}") from None
    if not found:
        raise InputError(
            f"{name} is not on this machine, and {hub_url(repository)} has no config.json"
        )
    # a model that will be refused is refused before its weights are downloaded
    read_config(read_json(folder / "config.json"), folder / "config.json")
    if name not in RELEASES:
        for file in TOKENIZER_FILES:
            fetch(repository, file, folder)
    if weights:
        fetch_weights(repository, folder)
    return folder


def fetch(repository, file, folder):
    """Whether the repository has this file; then it is in the folder."""
    if (folder / file).exists():
        return True
    try:
        download(hub_url(f"{repository}/resolve/main/{file}"), folder / file)
    except NotFound:
        return False
    return True


def fetch_weights(repository, folder):
    if not any(fetch(repository, file, folder) for file in WEIGHTS):   # the first that it has
        raise InputError(f"{hub_url(repository)} has none of {', '.join(WEIGHTS)}")
    for path in files_of_index(folder / WEIGHTS[1]):
        if not fetch(repository, path.name, folder):
            raise InputError(f"{hub_url(repository)} lacks {path.name}, which its index names")


def is_complete(folder):
    """Whether config.json and all files of weights are there"""
    files = [folder / "config.json", *weight_files(folder)]
    return all(path.exists() for path in files)


def weight_files(folder):
    """The file of a folder's tensors, or the files that its index names; they may be missing."""
    whole, index, pickled = (folder / name for name in WEIGHTS)
    if whole.exists():
        return [whole]
    return files_of_index(index) or [pickled]


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
