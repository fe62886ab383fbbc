"""Atomic file writes, and errors with a remedy for a full disk."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loraq.errors import DiskFullError, LoraqError
from loraq.utils.plain import to_plain

TEMPORARY = ".writing"


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically: to a temporary file that is synced and renamed."""
    temporary = path.with_name(f".{path.name}{TEMPORARY}")
    try:
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise disk_error(error, path) from error
        raise


def write_json(path: Path, data: Any) -> None:
    """`to_plain(data)` as indented JSON with sorted keys, written by `write_bytes`."""
    write_bytes(path, (json.dumps(to_plain(data), indent=1, sort_keys=True) + "\n").encode())


def sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file by name, so that equal contents have equal bytes.

    The order in which safetensors writes metadata differs between processes.
    """
    with open(path, "r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) > length:
            raise LoraqError(
                f"'{path}': the header of {len(text)} bytes does not fit into {length} bytes."
            )
        stream.seek(8)
        stream.write(text.ljust(length))


def disk_error(error: OSError, path: Path) -> Exception:
    """DiskFullError with a remedy if the disk is full, else `error` unchanged."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    folder = path if path.is_dir() else path.parent
    try:
        free = f"{shutil.disk_usage(folder).free / 1e6:.1f} MB free"
    except OSError:
        free = "no space free"
    return DiskFullError(
        f"Disk full while writing '{path}' ({free}). No partial file was kept. Free some space "
        "(`loraq cache` lists what uses it) or set output=FOLDER on another disk, then run the "
        "same command again: it resumes."
    )


@contextlib.contextmanager
def reporting_full_disk(path: Path) -> Iterator[None]:
    """Raise `disk_error` if the block fails because the disk is full.

    safetensors raises its own exception type for a full disk.
    """
    try:
        yield
    except OSError as error:
        raise disk_error(error, path) from error
    except Exception as error:
        if "No space left" in str(error):
            raise disk_error(OSError(errno.ENOSPC, str(error)), path) from error
        raise


def remove_temporaries(folder: Path) -> None:
    """Delete the temporary files of processes that were killed."""
    for path in folder.rglob(f".*{TEMPORARY}"):
        path.unlink()
