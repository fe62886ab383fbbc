"""Parts of one product that several processes make together: each part by one of them.

The parts and their files follow from the product alone, so that any number of processes makes the
same bytes. `Store.share` gives the folder, and finishes the product when all parts are there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from loraq.utils.pieces import keep_piece, piece_damage

Claim = Callable[[str, bool], contextlib.AbstractContextManager[bool]]
"""(part, wait) → whether this process may make the part (`Locks.part`)."""


class Part(NamedTuple):
    """A part of a product: number, name for the claim, and files, the one written last first."""

    number: int
    name: str
    files: Sequence[Path]


def unfinished(parts: Sequence[Part]) -> list[Part]:
    """The parts of which a file is missing or does not match its checksum."""
    return [part for part in parts if any(map(piece_damage, part.files))]


def make_parts(
    folder: Path,
    parts: Sequence[Part],
    claim: Claim,
    make: Callable[[Part], None],
    done: Callable[[Part], None] = lambda _part: None,
) -> None:
    """Make the unfinished parts, unclaimed ones first; on return all are finished, by any process.

    make: writes a part's files (`write_piece`). done: called for every part that is finished.
    """
    todo = list(parts)
    for wait in (False, True):
        busy = []
        for part in todo:
            with claim(part.name, wait) as mine:
                made = mine and all(map(keep_piece, part.files))
                if not folder.is_dir():  # another process has finished the product
                    return
                if not mine:
                    busy.append(part)
                    continue
                if not made:
                    make(part)
                done(part)
        todo = busy
