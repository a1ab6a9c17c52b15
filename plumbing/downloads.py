"""Downloads: resumed where they stopped, verified before they appear under their name."""

import os
import time
from pathlib import Path

import requests

from plumbing.errors import InputError
from plumbing.files import need_disk, sha256
from plumbing.json_files import read_json
from plumbing.progress import Progress

TIMEOUT = (10, 30)   # seconds to connect, and to wait for the next bytes
CONTINUE = "run the same command again to continue from there"


class DownloadError(InputError):
    """A file could not be fetched."""


class NotFound(DownloadError):
    """The server says that it has no such file."""


def hub_url(path):
    """The address of path on the Hugging Face Hub, or on the mirror that HF_ENDPOINT names."""
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    return f"{hub.rstrip('/')}/{path}"


def download(url, path, sha256sum=None):
    """
    Fetch url to path, which appears only once it is complete and verified. Until then the bytes are
    kept in <path>.part, and the next call continues from there.

    sha256sum   the expected hash; without it, the one that the Hub sends along with large files
    raises      DownloadError with the address, what went wrong and what to do; OSError if the disk
                lacks room
    """
    path = Path(path)
    part = Path(f"{path}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with request(url, part) as response:
            if response.status_code not in (200, 206):
                raise refusal(url, path, response)
            if "text/html" in response.headers.get("Content-Type", ""):   # a login page, perhaps
                raise DownloadError(
                    f"{url} answered with a web page instead of the file: open it in a browser, "
                    "the network may want you to log in"
                )
            sha256sum = sha256sum or hash_from_hub(response)
            total = receive(response, part)
    except DownloadError:
        raise
    except (requests.RequestException, ValueError) as e:   # ValueError: nonsense in an address
        arrived = size_of(part)
        if arrived == 0:
            raise DownloadError(f"cannot fetch {url}: {reason(e)}; {alternatives(path)}") from None
        raise DownloadError(
            f"{url}: the connection broke after {arrived:,} bytes: {CONTINUE}"
        ) from None
    check_arrived(url, path, part, total, sha256sum)
    os.replace(part, path)


def request(url, part):
    """-> the server's answer to a request for the bytes that part does not have yet"""
    headers = {"Accept-Encoding": "identity"}   # uncompressed: offsets are those of the file itself
    token = os.environ.get("HF_TOKEN")
    if token and url.startswith(hub_url("")):
        headers["Authorization"] = f"Bearer {token}"   # requests drops it when redirected elsewhere
    have = size_of(part)
    if have:
        headers["Range"] = f"bytes={have}-"
    response = requests.get(url, headers=headers, stream=True, timeout=TIMEOUT)
    if have and response.status_code == 416:   # part is as long as the file, or longer
        response.close()
        part.unlink()
        return request(url, part)
    return response


def refusal(url, path, response):
    """The error for an answer without the file"""
    status = response.status_code
    kind = NotFound if status == 404 else DownloadError
    hint = ""
    if status in (401, 403) and url.startswith(hub_url("")):
        hint = "there is no such repository, or it is private: then set HF_TOKEN; "
    return kind(f"{url} answered {status} {response.reason}: {hint}to continue without it, "
                f"{alternatives(path)}")


def receive(response, part):
    """Write the body of response to part -> the size of the whole file, 0 if it is unknown"""
    # 206 means the bytes after those in part, 200 the whole file: not every server sends parts.
    have = size_of(part) if response.status_code == 206 else 0
    found = response.headers.get("Content-Range", "")
    if have and not found.startswith(f"bytes {have}-"):
        part.unlink()
        raise DownloadError(f"{response.url} sent other bytes than asked for ({found}): {CONTINUE}")
    length = response.headers.get("Content-Length", "")
    missing = int(length) if length.isdigit() else 0
    total = have + missing if missing else 0
    need_disk(part.parent, missing, f"downloading {part.stem}")
    progress = Progress(f"downloading {part.stem}", total, have)
    with open(part, "ab" if have else "wb") as f:
        for piece in pieces(response):
            f.write(piece)
            have += len(piece)
            progress(have)
    return total


def pieces(response):
    """
    Yield the body of response. A piece is larger than the last if that came at once, and smaller if
    it did not, so that a server that sends a byte a second does not keep progress from being shown.
    """
    if "Transfer-Encoding" in response.headers:   # then pieces are as the server makes them
        yield from response.iter_content(1 << 16)
        return
    size = 1
    start = time.monotonic()
    while piece := next(response.iter_content(size), b""):   # goes on where the last one stopped
        if time.monotonic() - start < 0.5:
            size = min(2 * size, 1 << 16)
        else:
            size = max(size // 2, 1)
        yield piece
        start = time.monotonic()


def holds_dictionary(path):
    try:
        read_json(path)
    except InputError:
        return False
    return True


def check_arrived(url, path, part, total, sha256sum):
    """DownloadError unless part is what download() was asked for; total: its bytes, 0 = unknown"""
    if size_of(part) == 0:
        part.unlink()
        raise DownloadError(f"{url} answered with an empty file; try again later")
    if total and size_of(part) != total:
        raise DownloadError(f"{url}: {size_of(part):,} of {total:,} bytes arrived: {CONTINUE}")
    mismatch = wrong_sha256(part, sha256sum)
    if path.suffix == ".json" and not holds_dictionary(part):
        mismatch = "no JSON dictionary in it"
    if mismatch:
        part.unlink()   # else the next call would continue from these bytes
        raise DownloadError(
            f"{url} sent a file with {mismatch}; try again, or {alternatives(path)}"
        )


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def hash_from_hub(response):
    """The sha256 that the Hub sends with its redirect to a large file; None from other servers."""
    for answer in (*response.history, response):
        etag = answer.headers.get("X-Linked-Etag", "").strip('"')
        if len(etag) == 64:
            return etag
    return None


def reason(e):
    """The gist of a network error; its own text is a chain of several lines."""
    if isinstance(e, requests.ConnectionError):
        return "no connection could be made"
    return f"the network failed ({type(e).__name__})"


def alternatives(path):
    """What works without this download."""
    return f"put the file at {path} yourself, or use config/stdlib.py, which needs no network"


def wrong_sha256(path, expected):
    """None if the file has the expected hash or none is known; else what is wrong."""
    if expected is None:
        return None
    found = sha256([path])
    if found == expected:
        return None
    return f"the wrong sha256 {found[:16]}…, expected {expected[:16]}…"


def verify(path, expected, source):
    """Raise InputError unless the file at path, put there by the user, has the expected sha256."""
    mismatch = wrong_sha256(path, expected)
    if mismatch:
        raise InputError(
            f"{path} has {mismatch}: it is not {source}; remove it and try again, or use your own "
            "text with --input"
        )
