"""Every file that the project writes: complete or absent, with the system's errors in words.

A file is written to a temporary file beside it, synced and renamed. The temporary file has a name
of its own in every process, so any number of processes may write the same file at the same time:
readers see the old file or one of the new ones, and the last one stays.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loraq.errors import LoraqError
from loraq.utils.disk_errors import TEMPORARY, reporting_disk_errors
from loraq.utils.plain import to_plain

ABANDONED = 3600.0
"""Seconds after which a temporary file that nobody has written to belongs to a dead process.

Neither the process's number nor a lock would tell: numbers repeat between containers and machines
that share a folder, and a lock can only be taken after the file exists.
"""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file to write, which then replaces `path`; makes its folder.

    If the block fails, `path` stays as it was and the temporary file is deleted. Errors of the
    system are raised as by `reporting_disk_errors`.
    """
    temporary = path.parent / temporary_name()
    try:
        with reporting_disk_errors(path):
            _prepare(path)
            temporary.touch(exist_ok=False)
            mode = temporary.stat().st_mode  # what the user's umask gives
            yield temporary
            os.chmod(temporary, mode)  # safetensors replaces it by a file that only its owner reads
            with open(temporary, "rb") as stream:
                os.fsync(stream.fileno())
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """LoraqError unless a file `path` can be written; creates its folder, for later."""
    temporary = path.parent / temporary_name()
    with reporting_disk_errors(path):
        _prepare(path)
        temporary.touch(exist_ok=False)
        temporary.unlink()


def _prepare(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        raise LoraqError(f"'{path}' is a device or a pipe. Give the path of a file.")


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` by `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, without changing its line ends, by `replacing`."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, data: Any) -> None:
    """`to_plain(data)` as indented JSON with sorted keys, written by `replacing`."""
    write_text(path, json.dumps(to_plain(data), indent=1, sort_keys=True) + "\n")


def temporary_name() -> str:
    """A new name for a temporary file, shorter than the limit of every file system."""
    return f".{secrets.token_hex(8)}{TEMPORARY}"


def remove_temporaries(folder: Path, unused: float = 0.0) -> None:
    """Delete the temporary files of processes that were killed.

    unused: seconds since the last write. 0 is right only if no other process writes to the folder.
    """
    for pattern in (f".*{TEMPORARY}", ".tmp??????"):  # the second are safetensors' own
        for path in folder.rglob(pattern):
            with contextlib.suppress(FileNotFoundError):  # its process has renamed or removed it
                if time.time() - path.stat().st_mtime >= unused:
                    path.unlink()


def folder_bytes(folder: Path) -> int:
    """Size of all files in a folder, while other processes may rename and remove some of them."""
    total = 0
    for inner, _, names in os.walk(folder):  # passes over folders that have gone
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(inner, name)).st_size
    return total


def check_room(folder: Path, size: int) -> None:
    """DiskFullError unless `folder` has room for `size` bytes, which are reserved and released."""
    reserved = folder / temporary_name()
    try:
        with reporting_disk_errors(folder), open(reserved, "xb") as stream:
            os.posix_fallocate(stream.fileno(), 0, size)
    finally:
        with contextlib.suppress(OSError):
            reserved.unlink(missing_ok=True)


def sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file by name, so that equal contents have equal bytes.

    The order in which safetensors writes metadata differs between processes.
    """
    with open(path, "r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) > length:
            raise LoraqError(
                f"'{path}': the header of {len(text)} bytes does not fit into {length} bytes."
            )
        stream.seek(8)
        stream.write(text.ljust(length))
