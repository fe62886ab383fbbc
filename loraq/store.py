"""Content-addressed products: outputs/<stage>/<key>/, finished or not there at all.

A product is written aside into `<key>.partial/`, gets a manifest with the sha256 of every file and
is then renamed. A stage that can resume leaves finished pieces in the partial folder when it is
killed; each piece is itself written aside and renamed. A finished product whose files no longer
match its manifest is reported and set aside, so that it is made again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loraq.errors import DiskFullError, LoraqError
from loraq.utils.plain import to_plain

MANIFEST = "manifest.json"
PARTIAL = ".partial"
TEMPORARY = ".writing"


def key(*parts: Any) -> str:
    """16 hex digits of the sha256 over the canonical JSON of plain data and dataclasses.

    A dataclass stands as its fields, whatever it is called, without those that came in a later
    release and have their default.
    """
    text = json.dumps(
        to_plain(parts, new_defaults=False), sort_keys=True, separators=(",", ":"), allow_nan=False
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_hash(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_bytes(path: Path, data: bytes) -> None:
    """`data` under `path` whole or not at all: written aside, synced, renamed."""
    aside = path.with_name(f".{path.name}{TEMPORARY}")
    try:
        with open(aside, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(aside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        if isinstance(error, OSError):
            raise disk_error(error, path) from error
        raise


def write_json(path: Path, data: Any) -> None:
    write_bytes(path, (json.dumps(to_plain(data), indent=1, sort_keys=True) + "\n").encode())


def sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file in the order of their names.

    The library writes them in an order of its own, another one in each process.
    """
    with open(path, "r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) > length:
            raise LoraqError(f"'{path}': a header of {len(text)} bytes does not fit into {length}.")
        stream.seek(8)
        stream.write(text.ljust(length))


def disk_error(error: OSError, path: Path) -> Exception:
    """A full disk as an error with a remedy; every other system error as it is."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    folder = path if path.is_dir() else path.parent
    try:
        free = f"{shutil.disk_usage(folder).free / 1e6:.1f} MB free"
    except OSError:
        free = "no space free"
    return DiskFullError(
        f"Disk full while writing '{path}' ({free}). Nothing half-written was kept. Free some "
        "space (`loraq cache` lists what takes it) or set output=FOLDER on another disk, then "
        "give the same command again: it goes on where it stopped."
    )


@contextlib.contextmanager
def full_disk_is_ours(path: Path) -> Iterator[None]:
    """A full disk as `disk_error` says it, whoever reports it: safetensors has its own error."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, path) from error
    except Exception as error:
        if "No space left" in str(error):
            raise disk_error(OSError(errno.ENOSPC, str(error)), path) from error
        raise


class Store:
    """The products of all stages under one root folder."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        self.corrupted: set[tuple[str, str]] = set()

    def path(self, stage: str, name: str) -> Path:
        return self.root / stage / name

    def manifest(self, stage: str, name: str) -> dict[str, Any] | None:
        """The manifest of a finished product, None where there is none; files are not read."""
        try:
            manifest = json.loads((self.path(stage, name) / MANIFEST).read_text())
        except (OSError, ValueError):
            return None
        return manifest if isinstance(manifest, dict) else None

    def finished(self, stage: str, name: str) -> bool:
        """Whether the product is there and whole; a damaged one is reported and set aside."""
        folder = self.path(stage, name)
        if not folder.is_dir():
            return False
        if self._damage(stage, name) is None:
            return True
        from filelock import FileLock

        with FileLock(str(folder.with_name(f".{name}.aside.lock"))):  # others look at it as well
            if not folder.is_dir():
                return False
            reason = self._damage(stage, name)
            if reason is None:  # made again meanwhile
                return True
            self.corrupted.add((stage, name))
            aside = folder.with_name(f"{name}.corrupted")
            print(
                f"loraq: cached product {folder} is corrupted ({reason}); it is set aside as "
                f"{aside.name} and made again.",
                file=sys.stderr,
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
        """One process at a time makes a product; a second one waits and then finds it made."""
        from filelock import FileLock, Timeout

        self._make_folder(self.root / stage)
        lock = FileLock(str(self.root / stage / f"{name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"loraq: another process makes {stage}/{name}; waiting for it.", file=sys.stderr)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def claim(self, stage: str, name: str, part: str, wait: bool) -> Iterator[bool]:
        """Whether this process may make a part of a product; False where another one does.

        With `wait`, until that one has let go of it. A process that dies lets go.
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
        """As `write` with `resume`, for processes that fill one folder together, part by part.

        None where the product is finished. The first process whose block ends finishes it.
        """
        final = self.path(stage, name)
        partial = final.with_name(name + PARTIAL)
        with self.lock(stage, name):
            there = self.finished(stage, name)
            if not there:
                self._make_folder(partial)
        if there:
            yield None
            return
        started = time.time()
        try:
            yield partial
            with self.lock(stage, name):
                if not final.is_dir():
                    _drop_temporaries(partial)
                    self._finish(partial, final, {"seconds": time.time() - started, **info})
                for lock in final.parent.glob(f"{name}.*.lock"):
                    lock.unlink(missing_ok=True)
        except OSError as error:
            raise disk_error(error, partial) from error

    @contextlib.contextmanager
    def write(
        self, stage: str, name: str, info: dict[str, Any] | None = None, resume: bool = False
    ) -> Iterator[Path]:
        """A folder to fill; it becomes the product when the block ends without an error.

        With `resume`, the pieces of an earlier, interrupted attempt are in it. `info` goes into
        the manifest as it stands when the block ends.
        """
        final = self.path(stage, name)
        partial = final.with_name(name + PARTIAL)
        started = time.time()
        if not resume:
            shutil.rmtree(partial, ignore_errors=True)
        self._make_folder(partial)
        _drop_temporaries(partial)
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

    def products(self) -> Iterator[tuple[str, str, str, int]]:
        """(stage, key, state, bytes) of everything there; state: finished, partial, corrupted."""
        if not self.root.is_dir():
            return
        for stage in sorted(path for path in self.root.iterdir() if path.is_dir()):
            for folder in sorted(path for path in stage.iterdir() if path.is_dir()):
                size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
                name, _, ending = folder.name.partition(".")
                if ending in ("partial", "corrupted"):
                    yield stage.name, name, ending, size
                elif (folder / MANIFEST).is_file():
                    yield stage.name, name, "finished", size


def _drop_temporaries(folder: Path) -> None:
    """What processes that were killed have left half-written."""
    for left in folder.rglob(f".*{TEMPORARY}"):
        left.unlink()
