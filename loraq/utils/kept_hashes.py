"""Hashes of large files, kept in the cache folder for other processes and for later runs.

    $HF_HOME/loraq/hashes/<name>.json    the state of a file (`FileState`) and its sha256

A hash is used only if the file has the same state as when it was read: a change is seen by the time
that the system gives it (ctime), which no program can set back. In any doubt the file is read. The
name of a file in the hub's cache, which is the sha256 of what was downloaded, is not used: it stays
when the file is damaged or written over.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

from loraq.errors import LoraqError
from loraq.utils.assets import cache_folder
from loraq.utils.files import write_json

LARGE = 1 << 26
"""Bytes from which a hash is kept; to hash less takes a tenth of a second or less."""


class FileState(NamedTuple):
    """What changes with a file's contents: its path without links, and the system's notes on it.

    modified, changed: its times in nanoseconds (mtime, ctime).
    """

    path: str
    device: int
    inode: int
    size: int
    modified: int
    changed: int


def file_state(path: Path) -> FileState:
    """The state of a file; OSError if it does not exist."""
    real = os.path.realpath(path)
    stat = os.stat(real)
    return FileState(
        real, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
    )


def kept_hash(state: FileState) -> str | None:
    """The sha256 that was kept for this state; None without one, and in any doubt."""
    if not _may_be_kept(state):
        return None
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        found = json.loads(_entry(state).read_text(encoding="utf-8"))
        digest = str(found["sha256"])
        if found == _contents(state, digest):
            return digest
    return None


def keep_hash(state: FileState, digest: str) -> None:
    """Keep the sha256 of a file that still has this state; without room for it, do nothing."""
    if _may_be_kept(state) and file_state(Path(state.path)) == state:
        with contextlib.suppress(OSError, LoraqError):
            write_json(_entry(state), _contents(state, digest))


def _may_be_kept(state: FileState) -> bool:
    """Whether the file is large, and its times tell every change.

    Images of file systems (SquashFS), which are read-only, may have one time for all files.
    """
    if state.size < LARGE:
        return False
    coarse = state.changed % 10**9 == 0
    return not (coarse and os.statvfs(state.path).f_flag & os.ST_RDONLY)


def _entry(state: FileState) -> Path:
    return cache_folder() / "hashes" / f"{_sha256(state.path)[:32]}.json"


def _contents(state: FileState, digest: str) -> dict[str, object]:
    """An entry, with a checksum of its own against damage."""
    checksum = _sha256(json.dumps([state, digest]))
    return {"state": list(state), "sha256": digest, "checksum": checksum}


def _sha256(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()
