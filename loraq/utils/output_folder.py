"""What an output folder needs for processes that use it at the same time, checked before a run.

Any number of processes on any number of machines may share one output folder. They rely on its
file system for atomic renames, exclusive creation of files, and locks (flock) that all of them see.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from loraq.errors import LoraqError
from loraq.utils.disk_errors import reporting_disk_errors
from loraq.utils.files import temporary_name

if TYPE_CHECKING:
    from filelock import FileLock

log = logging.getLogger(__name__)

LOCK = ".lock"
MOUNTS = Path("/proc/self/mountinfo")
LOCAL_LOCKS = {
    *("nolock", "local_lock=all", "local_lock=flock"),  # NFS
    *("localflock", "localflocks", "nobrl"),  # Lustre; GFS2 and OCFS2; SMB
    *("fuse.sshfs", "fuse.s3fs", "fuse.gcsfuse", "fuse.rclone"),
}
"""Mount options, and types of file systems, with which a lock is seen on one machine only."""


def check_output_folder(folder: Path, machines: bool = False) -> None:
    """Raise LoraqError unless files in `folder` can be written, replaced, renamed and locked.

    Creates the folder. machines: processes on several machines take part, so that their locks must
    be seen by all of them; otherwise the user is warned if they are not.
    """
    probe, moved = folder / temporary_name(), folder / temporary_name()
    try:
        with reporting_disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            probe.mkdir()
            for name in ("file", "other"):
                (probe / name).write_text(name)
            os.replace(probe / "other", probe / "file")
            for missing, works in (
                ("exclusive creation of files", _creates_exclusively(probe / "file")),
                ("locks (flock)", _locks(probe / "file")),
            ):
                if not works:
                    raise _unfit(folder, f"its file system has no {missing}")
            os.replace(probe, moved)
            if os.listdir(moved) != ["file"] or (moved / "file").read_text() != "other":
                raise _unfit(folder, "its file system does not rename folders and files at once")
    finally:
        for left in (probe, moved):
            shutil.rmtree(left, ignore_errors=True)
    if local := LOCAL_LOCKS.intersection(mount_options(folder, MOUNTS)):
        problem = f"it is mounted with {', '.join(sorted(local))}"
        if machines:
            raise _unfit(folder, f"{problem}, and this run is on several machines")
        log.warning("output=%s: %s; use it from one machine at a time.", folder, problem)


def _unfit(folder: Path, problem: str) -> LoraqError:
    return LoraqError(
        f"output={folder}: {problem}, so processes that use the folder at the same time would "
        "overwrite each other's work. Mount it with locks that all machines see (NFS: without "
        "nolock and local_lock; Lustre: flock), or set output=FOLDER on another file system."
    )


def _creates_exclusively(existing: Path) -> bool:
    try:
        existing.open("xb").close()
    except FileExistsError:
        return True
    return False


def _locks(path: Path) -> bool:
    """Whether a lock that one handle holds is refused to another, as to another process.

    flock belongs to the open handle, not to the process.
    """
    with path.open("rb+") as one, path.open("rb+") as other:
        try:
            fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def mount_options(folder: Path, mounts: Path) -> set[str]:
    """The mount options and the type of the file system of `folder`; empty if they are unknown."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return set()
    inside, found = folder.resolve(), (Path("/"), set[str]())
    for line in lines:
        fields, _, source = line.partition(" - ")
        point = Path(fields.split()[4].replace("\\040", " "))
        if inside.is_relative_to(point) and len(point.parts) >= len(found[0].parts):
            kind, *_, options = source.split()
            found = point, {kind, *fields.split()[5].split(","), *options.split(",")}
    return found[1]


def file_lock(path: Path, timeout: float = -1) -> FileLock:
    """The lock (flock) of the file `path`, which the system releases when its process dies.

    Without flock, acquiring it raises OSError. filelock would otherwise fall back to a file whose
    existence is the lock: that of a process that died would stay.
    """
    from filelock import FileLock

    return FileLock(str(path), timeout=timeout, fallback_to_soft=False)


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder while the block runs, so that its files belong together.

    Creates the folder; waits for other processes.
    """
    with reporting_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = file_lock(folder / LOCK)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
