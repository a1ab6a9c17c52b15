"""JSON files, which others may have written."""

import json

from plumbing.errors import InputError, first_line
from plumbing.files import replacing


def read_json(path):
    """The dictionary in a file, None if there is no file; InputError if it holds something else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as e:   # ValueError: of JSON, and of what is not UTF-8
        raise InputError(f"{path} is broken: {first_line(e)}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path} is broken: it holds no dictionary")
    return data


def write_json(path, data):
    """The file changes completely or not at all."""
    with replacing(path) as f:
        f.write(json.dumps(data, ensure_ascii=False, indent=1).encode())
