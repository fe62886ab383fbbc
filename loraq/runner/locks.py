"""Locks of products and of their parts, between processes.

    outputs/<stage>/<key>.lock           the product: held while it is made, read or removed
    outputs/<stage>/<key>.<part>.lock    a part of it: a batch, or a process that adds batches

A lock file is deleted while it is held. A process that was waiting for the deleted file notices
that and locks the new file of that name, so there are never two holders (filelock ≥ 3.30). The lock
of a process that dies is released; its file stays until the next process locks and deletes it. A
file system without flock is refused (`utils/output_folder.py`).
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from loraq.utils.disk_errors import reporting_disk_errors
from loraq.utils.output_folder import file_lock

if TYPE_CHECKING:
    from filelock import FileLock

log = logging.getLogger(__name__)


class Locks:
    """The locks of the products under one root folder; a process can hold one several times."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._held: dict[Path, FileLock] = {}

    def __repr__(self) -> str:
        return f"Locks('{self.root}')"

    @contextlib.contextmanager
    def product(self, stage: str, name: str) -> Iterator[None]:
        """Hold a product's lock while the block runs; waits for other processes."""
        with self._hold(self.root / stage / f"{name}.lock", wait=False) as held:
            if held:
                yield
                return
        log.warning("another process is using %s/%s; waiting for it.", stage, name)
        with self._hold(self.root / stage / f"{name}.lock", wait=True):
            yield

    def part(
        self, stage: str, name: str, part: str, wait: bool
    ) -> contextlib.AbstractContextManager[bool]:
        """Hold a part's lock while the block runs; yields False if another process holds it.

        With `wait`, waits for the lock.
        """
        return self._hold(self.root / stage / f"{name}.{part}.lock", wait)

    def joined(self, stage: str, name: str) -> contextlib.AbstractContextManager[bool]:
        """While the block runs, the product is in use (`unused`) without a lock on it as a whole.

        Enter it with the product's lock held.
        """
        return self.part(stage, name, f"process-{secrets.token_hex(8)}", wait=True)

    @contextlib.contextmanager
    def unused(self, stage: str, name: str) -> Iterator[bool]:
        """Hold the product's lock while the block runs, if no process holds it or a part of it.

        Yields False, at once, if one does.
        """
        with self._hold(self.root / stage / f"{name}.lock", wait=False) as held:
            yield held and not self.parts_in_use(stage, name)

    def in_use(self, stage: str, name: str) -> bool:
        """Whether a process holds the product or a part of it."""
        with self.unused(stage, name) as unused:
            return not unused

    def parts_in_use(self, stage: str, name: str) -> bool:
        """Whether a process holds a part; deletes the lock files of processes that died."""
        parts = list((self.root / stage).glob(f"{name}.*.lock"))
        return [self._remove_if_unused(path) for path in parts].count(False) > 0

    def remove_unused(self) -> int:
        """Delete all lock files that no process holds; returns their number."""
        return sum(map(self._remove_if_unused, list(self.root.glob("*/*.lock"))))

    def _remove_if_unused(self, path: Path) -> bool:
        with self._hold(path, wait=False) as held:
            return held

    @contextlib.contextmanager
    def _hold(self, path: Path, wait: bool) -> Iterator[bool]:
        from filelock import Timeout

        lock = self._held.get(path) or file_lock(path)
        try:
            with reporting_disk_errors(path):
                lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            yield False
            return
        self._held[path] = lock
        try:
            yield True
        finally:
            if lock.lock_counter == 1:
                path.unlink(missing_ok=True)  # before the release: afterwards it may be another's
                del self._held[path]
            lock.release()
