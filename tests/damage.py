"""Damage that a disk or a cable does to a file, and manifests that notice it."""

from __future__ import annotations

from pathlib import Path

from loraq.utils.manifest import certified_files, write_manifest


def flip_bit(path: Path, place: int) -> None:
    """Flip the lowest bit of the byte at `place`."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))


def certify(path: Path) -> None:
    """Write a manifest of the product with the file `path`, as the store does."""
    write_manifest(path.parent, {"files": certified_files(path.parent, ()), "info": {}})
