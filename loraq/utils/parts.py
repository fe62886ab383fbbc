"""Parts of one product that several processes make together: each part by one of them.

The parts and their files follow from the product alone, so that any number of processes makes the
same bytes. `Store.share` gives the folder, and finishes the product when all parts are there.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from loraq.utils.pieces import keep_piece, piece_damage

Claim = Callable[[str, bool], contextlib.AbstractContextManager[bool]]
"""(part, wait) → whether this process may make the part (`Locks.part`)."""


def alone(_part: str, _wait: bool) -> contextlib.AbstractContextManager[bool]:
    """The claim of a process that shares its parts with no other."""
    return contextlib.nullcontext(True)


class Part(NamedTuple):
    """A part of a product: number, name for the claim, and files, the one written last first."""

    number: int
    name: str
    files: Sequence[Path]


def intact(part: Part) -> bool:
    """Whether the part's files are there; a damaged one is reported and deleted."""
    return all(map(keep_piece, part.files))


def unfinished(parts: Sequence[Part]) -> list[Part]:
    """The parts of which a file is missing or does not match its checksum."""
    return [part for part in parts if any(map(piece_damage, part.files))]


def make_parts(
    folder: Path,
    parts: Sequence[Part],
    claim: Claim,
    make: Callable[[Part], Callable[[], object] | None],
    done: Callable[[Part], None] = lambda _part: None,
    keep: Callable[[Part], bool] = intact,
) -> None:
    """Make the unfinished parts, unclaimed ones first; on return all are finished, by any process.

    make: computes a part, and returns what writes its files (`write_piece`): a thread does, while
    the next part is computed; None if they are written. A part is claimed until it is written.
    done: called for every part that is finished. keep: whether a claimed part is finished already.
    """
    writing: deque[tuple[Part, Future[object], contextlib.ExitStack]] = deque()

    def settle(left: int = 0) -> None:
        """Wait until at most `left` parts are not written; raises the error of one that failed."""
        while len(writing) > left:
            part, written, claimed = writing.popleft()
            with claimed:
                written.result()
                done(part)

    todo = list(parts)
    with ThreadPoolExecutor(1, thread_name_prefix="writer") as writer:
        try:
            for wait in (False, True):
                busy = []
                for part in todo:
                    if wait:
                        settle()  # nobody waits for a process that itself waits
                    with contextlib.ExitStack() as claimed:
                        mine = claimed.enter_context(claim(part.name, wait))
                        made = mine and keep(part)
                        if not folder.is_dir():  # another process has finished the product
                            return settle()
                        if not mine:
                            busy.append(part)
                        elif made or (write := make(part)) is None:
                            done(part)
                        else:
                            writing.append((part, writer.submit(write), claimed.pop_all()))
                            settle(1)
                settle()
                todo = busy
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is told
                settle()
            raise
