"""Content-addressed products, outputs/<stage>/<key>/: either complete or absent.

A product is written to `<key>.partial/`, gets a manifest with the sha256 of every file and is then
renamed. A killed stage that can resume leaves its finished pieces in the partial folder; each piece
is itself written atomically. A finished product whose files no longer match its manifest is
reported, renamed to `<key>.corrupted` and made again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from loraq.utils.files import disk_error, remove_temporaries, write_json
from loraq.utils.hashing import file_hash

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
PARTIAL = ".partial"
ProductState = Literal["finished", "partial", "corrupted"]
UNFINISHED: dict[str, ProductState] = {"partial": "partial", "corrupted": "corrupted"}
"""Endings of the folders of products that are not finished."""


class Store:
    """The products of all stages under one root folder."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        self.corrupted: set[tuple[str, str]] = set()

    def __repr__(self) -> str:
        corrupted = f", {len(self.corrupted)} corrupted" if self.corrupted else ""
        return f"Store('{self.root}'{corrupted})"

    def path(self, stage: str, name: str) -> Path:
        """The folder of a finished product."""
        return self.root / stage / name

    def manifest(self, stage: str, name: str) -> dict[str, Any] | None:
        """The manifest of a product, None if it cannot be read; does not verify the files."""
        try:
            manifest = json.loads((self.path(stage, name) / MANIFEST).read_text())
        except (OSError, ValueError):
            return None
        return manifest if isinstance(manifest, dict) else None

    def finished(self, stage: str, name: str) -> bool:
        """Whether the product is complete; a corrupted one is reported and renamed."""
        folder = self.path(stage, name)
        if not folder.is_dir():
            return False
        if self._damage(stage, name) is None:
            return True
        from filelock import FileLock

        with FileLock(
            str(folder.with_name(f".{name}.aside.lock"))
        ):  # other processes may find the same damage
            if not folder.is_dir():
                return False
            reason = self._damage(stage, name)
            if reason is None:  # another process has made it again
                return True
            self.corrupted.add((stage, name))
            aside = folder.with_name(f"{name}.corrupted")
            log.warning(
                "cached product %s is corrupted (%s); it is renamed to %s and made again.",
                folder,
                reason,
                aside.name,
            )
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(folder, aside)
        return False

    def _damage(self, stage: str, name: str) -> str | None:
        manifest = self.manifest(stage, name)
        if manifest is None or not isinstance(manifest.get("files"), dict):
            return f"no readable {MANIFEST}"
        for relative, entry in manifest["files"].items():
            path = self.path(stage, name) / relative
            if not path.is_file():
                return f"{relative} is missing"
            if path.stat().st_size != entry["size"] or file_hash(path) != entry["sha256"]:
                return f"{relative} does not match its sha256"
        return None

    @contextlib.contextmanager
    def lock(self, stage: str, name: str) -> Iterator[None]:
        """Hold the product's lock while the block runs; waits for other processes."""
        from filelock import FileLock, Timeout

        self._make_folder(self.root / stage)
        lock = FileLock(str(self.root / stage / f"{name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.warning("another process is making %s/%s; waiting for it.", stage, name)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def claim(self, stage: str, name: str, part: str, wait: bool) -> Iterator[bool]:
        """Lock a part of a product while the block runs; yields False if another process holds it.

        With `wait`, waits for the lock. The lock of a process that dies is released.
        """
        from filelock import FileLock, Timeout

        lock = FileLock(str(self.root / stage / f"{name}.{part}.lock"))
        try:
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    @contextlib.contextmanager
    def share(self, stage: str, name: str, info: dict[str, Any]) -> Iterator[Path | None]:
        """Like `write` with `resume`, for processes that fill one folder together, part by part.

        Yields None if the product is finished. The first process whose block ends finishes it.
        """
        final = self.path(stage, name)
        partial = final.with_name(name + PARTIAL)
        with self.lock(stage, name):
            finished = self.finished(stage, name)
            if not finished:
                self._make_folder(partial)
        if finished:
            yield None
            return
        started = time.time()
        try:
            yield partial
            with self.lock(stage, name):
                if not final.is_dir():
                    remove_temporaries(partial)
                    self._finish(partial, final, {"seconds": time.time() - started, **info})
                for lock in final.parent.glob(f"{name}.*.lock"):
                    lock.unlink(missing_ok=True)
        except OSError as error:
            raise disk_error(error, partial) from error

    @contextlib.contextmanager
    def write(
        self, stage: str, name: str, info: dict[str, Any] | None = None, resume: bool = False
    ) -> Iterator[Path]:
        """Yield a folder to fill; it becomes the product when the block ends without an error.

        resume: keep the finished pieces of an interrupted attempt. info: entries of the manifest,
        read when the block ends. Raises DiskFullError if the disk is full.
        """
        final = self.path(stage, name)
        partial = final.with_name(name + PARTIAL)
        started = time.time()
        if not resume:
            shutil.rmtree(partial, ignore_errors=True)
        self._make_folder(partial)
        remove_temporaries(partial)
        try:
            yield partial
            self._finish(partial, final, {"seconds": time.time() - started, **(info or {})})
        except OSError as error:
            if not resume:
                shutil.rmtree(partial, ignore_errors=True)
            raise disk_error(error, partial) from error
        except BaseException:
            if not resume:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _finish(self, partial: Path, final: Path, info: dict[str, Any]) -> None:
        files = {}
        for path in sorted(partial.rglob("*")):
            if path.is_file() and path.name != MANIFEST:
                entry = {"sha256": file_hash(path), "size": path.stat().st_size}
                files[path.relative_to(partial).as_posix()] = entry
        write_json(partial / MANIFEST, {"files": files, "info": info, "finished": time.time()})
        os.replace(partial, final)

    def _make_folder(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, folder) from error

    def products(self) -> Iterator[tuple[str, str, ProductState, int]]:
        """(stage, key, state, bytes) of all products."""
        if not self.root.is_dir():
            return
        for stage in sorted(path for path in self.root.iterdir() if path.is_dir()):
            for folder in sorted(path for path in stage.iterdir() if path.is_dir()):
                size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
                name, _, ending = folder.name.partition(".")
                if ending in UNFINISHED:
                    yield stage.name, name, UNFINISHED[ending], size
                elif (folder / MANIFEST).is_file():
                    yield stage.name, name, "finished", size
