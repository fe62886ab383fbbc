"""Content-addressed products, outputs/<stage>/<key>/: either complete or absent.

A product is written to `<key>.partial/`, gets a manifest with the sha256 of every file and is then
renamed. A killed stage that can resume leaves its finished pieces in the partial folder; each piece
is itself written atomically, with a checksum (`utils/pieces.py`). A finished product whose files no
longer match its manifest is reported, renamed to `<key>.corrupted` and made again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from loraq.runner.locks import Locks
from loraq.utils.disk_errors import disk_error
from loraq.utils.files import folder_bytes, remove_temporaries
from loraq.utils.manifest import certified_files, product_damage, read_manifest, write_manifest
from loraq.utils.pieces import MANIFEST, remove_checksums

log = logging.getLogger(__name__)

PARTIAL = ".partial"
ProductState = Literal["finished", "partial", "corrupted"]
UNFINISHED: dict[str, ProductState] = {"partial": "partial", "corrupted": "corrupted"}
"""Endings of the folders of products that are not finished."""


class Rate(NamedTuple):
    """Mean seconds and bytes per unit (prompt, caption, …) of finished products."""

    products: int
    seconds: float
    size: float

    def and_one(self, seconds: float, size: float) -> Rate:
        """The mean with one more product."""
        count = self.products + 1
        return Rate(
            count,
            self.seconds + (seconds - self.seconds) / count,
            self.size + (size - self.size) / count,
        )


class Store:
    """The products of all stages under one root folder.

    read_only: corrupted products are reported, but not renamed.
    """

    def __init__(self, root: str | os.PathLike[str], read_only: bool = False) -> None:
        self.root = Path(root)
        self.read_only = read_only
        self.locks = Locks(self.root)
        self.corrupted: set[tuple[str, str]] = set()
        self._rates: dict[str, dict[str, Rate]] = {}

    def __repr__(self) -> str:
        corrupted = f", {len(self.corrupted)} corrupted" if self.corrupted else ""
        return f"Store('{self.root}'{corrupted})"

    def path(self, stage: str, name: str) -> Path:
        """The folder of a finished product."""
        return self.root / stage / name

    def manifest(self, stage: str, name: str) -> dict[str, Any] | None:
        """The manifest of a product, None if it cannot be read; does not verify the files."""
        return read_manifest(self.path(stage, name))

    def rate(self, stage: str, kind: str) -> Rate | None:
        """The mean rate of the finished products of a stage and kind; None if there are none.

        Reads the manifests that are there at the first call, and those that this store writes.
        """
        if stage not in self._rates:
            self._rates[stage] = {}
            with contextlib.suppress(FileNotFoundError):
                for path in (self.root / stage).iterdir():
                    if "." not in path.name and (manifest := read_manifest(path)):
                        self._add_rate(stage, manifest)
        return self._rates[stage].get(kind)

    def _add_rate(self, stage: str, manifest: dict[str, Any]) -> None:
        info, known = manifest["info"], self._rates.get(stage)
        if known is not None and (units := info.get("units")):
            size = sum(entry["size"] for entry in manifest["files"].values())
            mean = known.get(info["kind"], Rate(0, 0.0, 0.0))
            known[info["kind"]] = mean.and_one(info["seconds"] / units, size / units)

    def finished(self, stage: str, name: str, pieces: Collection[str] = ()) -> bool:
        """Whether the product is complete; a corrupted one is reported and renamed.

        pieces: files that the manifest must list.
        """
        if not self.path(stage, name).is_dir():
            return self._completed(stage, name, pieces)
        reason = self.damage(stage, name, pieces)
        if reason is None:
            return True
        if self.read_only:
            self.corrupted.add((stage, name))
            log.warning("cached product %s is corrupted (%s).", self.path(stage, name), reason)
            return False
        with self.lock(stage, name):  # other processes may read it, or find the same damage
            if not self.path(stage, name).is_dir():
                return False
            reason = self.damage(stage, name, pieces)
            if reason is not None:  # else another process has made it again
                self.set_aside(stage, name, reason)
        return reason is None

    def set_aside(self, stage: str, name: str, reason: str) -> None:
        """Report a corrupted product and rename it; its lock is held."""
        folder = self.path(stage, name)
        aside = folder.with_name(f"{name}.corrupted")
        self.corrupted.add((stage, name))
        log.warning(
            "cached product %s is corrupted (%s); it is renamed to %s and made again.",
            folder,
            reason,
            aside.name,
        )
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)

    def damage(self, stage: str, name: str, pieces: Collection[str] = ()) -> str | None:
        """Why a finished product is corrupted, None if it is not; `pieces` as in `finished`."""
        return product_damage(self.path(stage, name), pieces)

    @contextlib.contextmanager
    def lock(self, stage: str, name: str) -> Iterator[None]:
        """Hold the product's lock while the block runs; waits for other processes."""
        self._make_folder(self.root / stage)
        with self.locks.product(stage, name):
            yield

    @contextlib.contextmanager
    def share(
        self, stage: str, name: str, info: dict[str, Any], pieces: Collection[str] = ()
    ) -> Iterator[Path | None]:
        """Like `write` with `resume`, for processes that fill one folder together, part by part.

        Yields None if the product is finished. The first process whose block ends finishes it.
        """
        partial = self._partial(stage, name)
        with contextlib.ExitStack() as stack:
            with self.lock(stage, name):
                finished = self.finished(stage, name, pieces)
                if not finished:
                    self._make_folder(partial)
                    stack.enter_context(self.locks.joined(stage, name))
            if finished:
                yield None
                return
            with self._filling(stage, name, info, pieces):
                yield partial
        self.locks.parts_in_use(stage, name)  # deletes the lock files of processes that died

    @contextlib.contextmanager
    def write(
        self,
        stage: str,
        name: str,
        info: dict[str, Any] | None = None,
        pieces: Collection[str] = (),
        resume: bool = False,
    ) -> Iterator[Path]:
        """Yield a folder to fill; it becomes the product when the block ends without an error.

        info: entries of the manifest. pieces: files that the product must have. Both are read when
        the block ends. resume: keep the pieces of an interrupted attempt; each is verified by
        `keep_piece` before it is used. Holds the product's lock. Raises DiskFullError if the disk
        is full, LoraqError if a piece is missing or was changed after it was written.
        """
        partial = self._partial(stage, name)
        with self.lock(stage, name):
            if not resume:
                shutil.rmtree(partial, ignore_errors=True)
            self._make_folder(partial)
            remove_temporaries(partial)
            try:
                with self._filling(stage, name, info or {}, pieces):
                    yield partial
            except BaseException:
                if not resume:
                    shutil.rmtree(partial, ignore_errors=True)
                raise

    @contextlib.contextmanager
    def _filling(
        self, stage: str, name: str, info: dict[str, Any], pieces: Collection[str]
    ) -> Iterator[None]:
        """Finish the product when the block ends, unless another process has done it."""
        partial, final, started = self._partial(stage, name), self.path(stage, name), time.time()
        try:
            yield
            with self.lock(stage, name):
                if final.is_dir():
                    return
                remove_temporaries(partial)
                manifest = {
                    "files": certified_files(partial, pieces),
                    "info": {"seconds": time.time() - started, **info},
                    "finished": time.time(),
                }
                write_manifest(partial, manifest)
                remove_checksums(partial)
                os.replace(partial, final)
                self._add_rate(stage, manifest)
        except OSError as error:
            raise disk_error(error, partial) from error

    def _completed(self, stage: str, name: str, pieces: Collection[str]) -> bool:
        """Rename a product whose process died after its manifest; returns whether there was one."""
        partial, final = self._partial(stage, name), self.path(stage, name)
        if self.read_only or not (partial / MANIFEST).is_file():
            return False
        with self.lock(stage, name):
            if product_damage(partial, pieces) is None:
                remove_checksums(partial)
                os.replace(partial, final)
            else:
                (partial / MANIFEST).unlink(missing_ok=True)  # its pieces are verified one by one
        return final.is_dir()

    def _partial(self, stage: str, name: str) -> Path:
        return self.root / stage / (name + PARTIAL)

    def remove(self, folder: Path) -> bool:
        """Delete the folder of an unfinished or corrupted product, unless a process uses it.

        Returns whether it was deleted. A product that is finished and complete never is.
        """
        stage, name = folder.parent.name, folder.name.partition(".")[0]
        with self.locks.unused(stage, name) as unused:
            removed = unused and not (folder.name == name and self.damage(stage, name) is None)
            if removed:
                shutil.rmtree(folder, ignore_errors=True)
        return removed and not folder.exists()

    def _make_folder(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, folder) from error

    def products(self) -> Iterator[tuple[Path, ProductState, int]]:
        """(folder, state, bytes) of all products."""
        if not self.root.is_dir():
            return
        for stage in sorted(path for path in self.root.iterdir() if path.is_dir()):
            for folder in sorted(path for path in stage.iterdir() if path.is_dir()):
                size = folder_bytes(folder)
                ending = folder.name.partition(".")[2]
                if ending in UNFINISHED:
                    yield folder, UNFINISHED[ending], size
                elif (folder / MANIFEST).is_file():
                    yield folder, "finished", size
