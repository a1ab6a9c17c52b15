"""Files on the local disk: write them atomically, hash them, check for room before a large one."""

import hashlib
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from plumbing.progress import Progress


@contextmanager
def replacing(path):
    """
    `with replacing(path) as f`: a binary file that takes the place of path when the block ends.

    At every moment, even after a power failure, path holds all of the old bytes or all of the new.
    If the block raises, path keeps the old ones.
    """
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())   # the bytes must reach the disk before the name does
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def give_second_name(path, name):
    """
    Make name a second name (hard link) of the file at path, in place of any file of that name. On
    disks without hard links it becomes a copy.
    """
    temporary = Path(f"{name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        with open(path, "rb") as original, replacing(name) as copy:
            shutil.copyfileobj(original, copy, 1 << 20)
        return
    os.replace(temporary, name)
    temporary.unlink(missing_ok=True)   # replace does nothing if both are already one file


def sha256(paths):
    """The SHA-256 of the files' concatenation, in hexadecimal."""
    digest = hashlib.sha256()
    progress = Progress("sha256", sum(os.path.getsize(path) for path in paths))
    done = 0
    for path in paths:
        with open(path, "rb") as f:
            while piece := f.read(1 << 20):
                digest.update(piece)
                done += len(piece)
                progress(done)
    return digest.hexdigest()


def need_disk(folder, size, what):
    """Make folder; OSError unless its disk has size bytes free for what."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < size:
        # not an InputError, because errors.py imports this file; explain() shows both as one line
        raise OSError(
            f"{what} needs {size / 1e6:,.0f} MB in {folder}, {free / 1e6:,.0f} MB are free: "
            "free some space first"
        )
