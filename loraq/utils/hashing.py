"""sha256 of files and plain data, for cache keys and checksums."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from loraq.errors import LoraqError
from loraq.utils.kept_hashes import FileState, file_state, keep_hash, kept_hash
from loraq.utils.plain import to_plain

CHECKSUMS = "SHA256SUMS"
SETTLED = 2 * 10**9
"""Nanoseconds after which a changed file certainly has another time of change."""


def key(*parts: Any) -> str:
    """Cache key: 16 hex digits of the sha256 of canonical JSON.

    parts: plain data and dataclasses. A dataclass contributes its fields, but neither its class
        name nor fields that a later release added and that have their default.
    """
    plain = to_plain(parts, new_defaults=False)
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text_hash(text)[:16]


def text_hash(text: str) -> str:
    """sha256 of a text in UTF-8, 64 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def file_hash(path: Path) -> str:
    """sha256 of a file's contents, 64 hex digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def cached_hash(path: Path) -> str:
    """`file_hash`, cached until the file changes; that of a large file also for later processes.

    File systems count times in steps, so the hash of a file that has just changed is not kept.
    """
    state = file_state(path)
    if abs(time.time_ns() - state.changed) < SETTLED:
        return file_hash(path)
    return _hash_of_state(state)


@functools.lru_cache(maxsize=1 << 15)
def _hash_of_state(state: FileState) -> str:
    digest = kept_hash(state)
    if digest is None:
        digest = file_hash(Path(state.path))
        keep_hash(state, digest)
    return digest


def files_hash(folder: Path, names: Iterable[str]) -> str:
    """sha256 over the sorted names and the contents of files in a folder, 64 hex digits."""
    return text_hash("".join(f"{name} {cached_hash(folder / name)}\n" for name in sorted(names)))


def check_sha256sums(folder: Path, names: Sequence[str], what: str) -> None:
    """LoraqError if a file of `names` does not match its entry in the folder's SHA256SUMS.

    what: the owner of the files, for the error.
    """
    for name, expected in read_sha256sums(folder).items():
        path = folder / name
        if name in names and path.is_file() and (found := cached_hash(path)) != expected:
            raise LoraqError(
                f"{what}: '{path}' does not match {CHECKSUMS} (sha256 {found[:12]}…, "
                f"{expected[:12]}… expected). Restore the file (git checkout, or download it "
                f"again), or correct {CHECKSUMS}."
            )


def read_sha256sums(folder: Path) -> dict[str, str]:
    """File name → sha256 from the folder's SHA256SUMS; empty without that file."""
    path = folder / CHECKSUMS
    if not path.is_file():
        return {}
    sums = {}
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    for number, line in enumerate(text.split("\n"), 1):
        found = re.fullmatch(r"([0-9a-fA-F]{64})\s+\*?(?:\./)?(.+)", line)
        if found:
            sums[found[2]] = found[1].lower()
        elif line.strip():
            raise LoraqError(
                f"'{path}', line {number} is not one of sha256sum: '{line[:80]}'. Write the file "
                "again (sha256sum FILE … > SHA256SUMS), or delete it."
            )
    return sums
