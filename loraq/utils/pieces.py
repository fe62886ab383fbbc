"""Pieces of unfinished work. Each has a checksum, verified before the piece is used again.

    FOLDER/NAME            a piece: a group of packed layers, a batch's embeddings, an image, …
    FOLDER/.sha256/NAME    its sha256, written before the piece

A finished product holds the checksums in its manifest instead (`runner/store.py`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path

from loraq.utils.files import write_bytes
from loraq.utils.hashing import file_hash

log = logging.getLogger(__name__)

CHECKSUM_FOLDER = ".sha256"
MANIFEST = "manifest.json"
"""Written over all pieces, verified, when a product is finished; the checksums are removed then."""


def write_piece(path: Path, data: bytes) -> str:
    """Write a piece with its checksum, both atomically; returns the sha256, 64 hex digits."""
    digest = hashlib.sha256(data).hexdigest()
    write_checksum(path, digest)
    write_bytes(path, data)
    return digest


def write_checksum(path: Path, digest: str) -> None:
    """Write the sha256 of the piece `path`, before the piece itself."""
    write_bytes(_checksum_file(path), digest.encode())


def piece_damage(path: Path) -> str | None:
    """Why a piece of an earlier attempt cannot be used; None if it matches its checksum."""
    if not path.is_file():
        return "is missing"
    try:
        found = file_hash(path)
        expected = _checksum_file(path).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return "has no checksum (an older version wrote it, or the checksum was removed)"
    return None if found == expected else "does not match its checksum"


def keep_piece(path: Path) -> bool:
    """Whether a piece of an earlier attempt is used; a damaged one is reported and deleted."""
    if not path.is_file():
        return False
    reason = piece_damage(path)
    if reason is not None and _certified(path):
        return True  # another process is finishing the product and removes the checksums
    if reason is not None and path.is_file():  # else another process has finished the product
        log.warning("'%s' %s; it is deleted and made again.", path, reason)
        path.unlink(missing_ok=True)
    return reason is None


def remove_piece(path: Path) -> None:
    """Delete a piece, if it exists, and its checksum."""
    path.unlink(missing_ok=True)
    _checksum_file(path).unlink(missing_ok=True)


def _certified(path: Path) -> bool:
    """Whether the manifest of the piece's product lists it with these bytes.

    Pieces lie in the product's folder or one below.
    """
    for folder in list(path.parents)[:2]:
        try:
            files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
            expected = files[path.relative_to(folder).as_posix()]["sha256"]
            return bool(expected == file_hash(path))
        except (OSError, ValueError, LookupError, TypeError):
            continue
    return False


def checksums(folder: Path) -> dict[str, str]:
    """Path relative to `folder` → sha256 of every piece, as it was written."""
    return {
        (path.parents[1] / path.name).relative_to(folder).as_posix(): path.read_text("utf-8")
        for path in folder.rglob(f"{CHECKSUM_FOLDER}/*")
    }


def remove_checksums(folder: Path) -> None:
    """Delete the checksums of all pieces under `folder`."""
    for path in list(folder.rglob(CHECKSUM_FOLDER)):
        shutil.rmtree(path)


def _checksum_file(path: Path) -> Path:
    return path.parent / CHECKSUM_FOLDER / path.name
