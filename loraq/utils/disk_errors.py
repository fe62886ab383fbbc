"""Errors of the file system in words: the path, what is wrong with it, and the remedy."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from loraq.errors import DiskFullError, LoraqError

TEMPORARY = ".writing"
"""Ending of the names of temporary files."""

ELSEWHERE = "use another folder (output=FOLDER)"
REASONS: dict[int, tuple[str, str]] = {
    errno.EACCES: ("this user has no permission", f"Change its permissions, or {ELSEWHERE}."),
    errno.EPERM: ("the system does not permit it", f"Change its permissions, or {ELSEWHERE}."),
    errno.EROFS: ("its file system is read-only", f"Mount it writable, or {ELSEWHERE}."),
    errno.ENOTDIR: ("it is a file, not a folder", f"Move it, or {ELSEWHERE}."),
    errno.EEXIST: ("it exists already", f"Move it, or {ELSEWHERE}."),
    errno.ENOTEMPTY: ("it exists already", f"Move it, or {ELSEWHERE}."),
    errno.EISDIR: ("it is a folder, not a file", "Move it, or give the path of a file."),
    errno.ENAMETOOLONG: ("its name is too long", "Choose a shorter one."),
    errno.ELOOP: ("its symbolic links form a loop", f"Correct them, or {ELSEWHERE}."),
    errno.EMFILE: ("too many files are open", "Raise the limit, for example: ulimit -n 4096"),
    errno.ENFILE: ("too many files are open on this machine", "End other programs."),
    errno.ENOENT: (
        "it does not exist, or no longer",
        "If another process has removed it, run the same command again; correct a link that leads "
        "nowhere.",
    ),
    errno.ESTALE: ("its server has replaced it", "Run the same command again."),
    errno.EIO: ("the disk or the network failed", f"Check it (dmesg), or {ELSEWHERE}."),
    errno.EFBIG: (
        "it would be larger than the system allows",
        f"Raise the limit (ulimit -f unlimited), or {ELSEWHERE}.",
    ),
    errno.ENOLCK: ("its file system has no locks", f"Mount it with locks, or {ELSEWHERE}."),
    errno.ENOSYS: ("its file system lacks a function", f"To continue, {ELSEWHERE}."),
    errno.ENOTSUP: ("its file system lacks a function", f"To continue, {ELSEWHERE}."),
}
"""Number of a system error → what is wrong, and the remedy."""


def disk_error(error: OSError, path: Path) -> Exception:
    """LoraqError with a remedy for an error of the file system; any other `error` unchanged.

    path: what was written, for errors that do not name a path themselves.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _full_disk(path)
    if error.errno not in REASONS:
        return error
    named = error.filename2 or error.filename
    if named is not None and not isinstance(named, int) and TEMPORARY not in os.fsdecode(named):
        path = Path(os.fsdecode(named))
    number = error.errno
    if number in (errno.ENOTDIR, errno.EEXIST):
        path, number = _obstacle(path, number)
    reason, remedy = REASONS[number]
    if number == errno.ENAMETOOLONG:
        longest = max(len(os.fsencode(part)) for part in path.parts)
        reason += f" ({longest} bytes in one part, {len(os.fsencode(path))} in all; most file "
        reason += "systems allow 255 and 4096)"
    elif number == errno.EMFILE:
        reason += f" (this process may open {resource.getrlimit(resource.RLIMIT_NOFILE)[0]})"
    return LoraqError(f"Cannot use '{path}': {reason}. {remedy}")


def _obstacle(path: Path, number: int) -> tuple[Path, int]:
    """The part of `path` that is no folder, and the error that describes it."""
    for part in (path, *path.parents):
        if os.path.lexists(part) and not os.path.isdir(part):
            try:
                part.stat()
            except OSError as error:  # a link into nothing, or into itself
                return part, error.errno if error.errno in REASONS else number
            return part, errno.ENOTDIR
    return path, number


def _full_disk(path: Path) -> DiskFullError:
    try:
        free = f"{shutil.disk_usage(_existing(path)).free / 1e6:.1f} MB free"
    except OSError:
        free = "no space free"
    return DiskFullError(
        f"Disk full while writing '{path}' ({free}). No partial file was kept. Free some space "
        "(`loraq cache` lists what uses it) or set output=FOLDER on another disk, then run the "
        "same command again: it resumes."
    )


def _existing(path: Path) -> Path:
    """The path or its first parent that exists."""
    return next((p for p in (path, *path.parents) if os.path.exists(p)), path)


@contextlib.contextmanager
def reporting_disk_errors(path: Path) -> Iterator[None]:
    """Raise `disk_error` for errors of the file system in the block.

    safetensors raises its own exception type, with the system's number in its text.
    """
    try:
        yield
    except LoraqError:
        raise
    except OSError as error:
        raise disk_error(error, path) from error
    except Exception as error:
        if (number := re.search(r"\(os error (\d+)\)", str(error))) is not None:
            raise disk_error(OSError(int(number[1]), str(error)), path) from error
        if "No space left" in str(error):
            raise _full_disk(path) from error
        raise
