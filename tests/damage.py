"""Damage that a disk or a cable does to a file, and manifests that notice it."""

from __future__ import annotations

from pathlib import Path

from loraq.utils.files import write_json
from loraq.utils.manifest import MANIFEST, certified_files


def flip_bit(path: Path, place: int) -> None:
    """Flip the lowest bit of the byte at `place`."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))


def certify(path: Path) -> None:
    """Write a manifest of the product with the file `path`, as the store does."""
    files = certified_files(path.parent, ())
    write_json(path.parent / MANIFEST, {"files": files, "info": {}})
