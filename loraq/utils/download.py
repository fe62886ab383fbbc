"""Download files over HTTP: each one complete and verified, or absent.

huggingface_hub resumes a download only within one process; here a file of gigabytes also resumes
after the process was killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loraq.errors import DiskFullError, LoraqError
from loraq.utils.console import size_text
from loraq.utils.disk_errors import disk_error
from loraq.utils.texts import first_line

CHUNK = 1 << 20
ATTEMPTS = 5


def check_space(folder: Path, size: int, what: str) -> None:
    """DiskFullError unless the disk of `folder`, in the hub's cache, has `size` bytes free.

    what: needs them, for the error. The folder may not exist yet.
    """
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if (free := shutil.disk_usage(existing).free) < size:
        raise DiskFullError(
            f"{what}: '{folder}' has room for {size_text(free)}, and {size_text(size)} are needed. "
            "Free some space, or set HF_HOME=FOLDER to a folder on another disk."
        )


@contextlib.contextmanager
def reporting_download_errors(what: str, folder: Path) -> Iterator[None]:
    """Raise LoraqError with a remedy for errors of the network and of the disk in the block.

    what: what is downloaded; folder: where to, for the message.
    """
    try:
        yield
    except LoraqError:
        raise
    except Exception as error:  # huggingface_hub also raises the errors of its HTTP client
        if isinstance(error, OSError) and (told := disk_error(error, folder)) is not error:
            raise told from error
        reason = first_line(error)
        raise LoraqError(
            f"fetch: the download of {what} failed ({reason[:160]}). Run the same command again: "
            f"it resumes; without network access, copy the folder '{folder}' from another machine."
        ) from None


def download_file(
    url: str,
    target: Path,
    size: int,
    digest: str,
    progress: bool = True,
    headers: Mapping[str, str] | None = None,
) -> None:
    """Download `url` to `target`, unless that file has the right contents already.

    digest: its sha256, or git's sha1 of it (as a hub tells of small files), in hexadecimal digits.
    LoraqError if the contents differ; they are deleted. Errors of the network are raised after
    `ATTEMPTS` in which nothing arrived; what has arrived is kept for the next call.
    """
    if target.is_file() and _matches(target, size, digest):
        return
    part = target.with_name(f"{target.name}.{digest[:12]}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    failures = 0
    while True:
        arrived = _length(part)
        try:
            _resume(url, part, size, progress, headers or {})
            break
        except Exception as error:
            failures = 0 if _length(part) > arrived else failures + 1
            if isinstance(error, OSError) or failures == ATTEMPTS:  # a full disk stays full
                raise
            time.sleep(0.2 * 2**failures)
    if not _matches(part, size, digest):
        part.unlink()
        raise LoraqError(
            f"fetch: '{target.name}' does not match the published size and checksum ({size} bytes, "
            f"{digest[:12]}…). It was deleted; run the same command again."
        )
    os.replace(part, target)


def _resume(url: str, part: Path, size: int, progress: bool, headers: Mapping[str, str]) -> None:
    """Download the missing part of a file and append it."""
    from huggingface_hub.utils import get_session
    from tqdm import tqdm

    start = _length(part)
    if start >= size:
        return
    asked = {**headers, "Accept-Encoding": "identity"}  # ranges count the bytes of the file
    if start:
        asked["Range"] = f"bytes={start}-"
    options: dict[str, Any] = {"headers": asked, "follow_redirects": True, "timeout": 30}
    with get_session().stream("GET", url, **options) as answer:
        answer.raise_for_status()
        if answer.status_code == 200:  # the server ignores ranges and sends the complete file
            start = 0
        name = part.name.removesuffix(".part").rpartition(".")[0]
        bar = tqdm(
            total=size, initial=start, desc=name, unit="B", unit_scale=True, disable=not progress
        )
        with bar, open(part, "r+b" if start else "wb") as stream:
            stream.seek(start)
            for data in answer.iter_bytes(CHUNK):
                stream.write(data)
                bar.update(len(data))


def _length(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _matches(path: Path, size: int, digest: str) -> bool:
    """Whether a file has this size and sha256, or git's sha1."""
    if path.stat().st_size != size:
        return False
    found = hashlib.sha256() if len(digest) == 64 else hashlib.sha1(f"blob {size}\0".encode())
    with open(path, "rb") as stream:
        while data := stream.read(CHUNK):
            found.update(data)
    return found.hexdigest() == digest
