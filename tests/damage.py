"""Damage that a disk or a cable does to a file."""

from __future__ import annotations

from pathlib import Path


def flip_bit(path: Path, place: int) -> None:
    """Flip the lowest bit of the byte at `place`."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))
