"""An output folder is refused before a run if processes could not share it."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading

import pytest

from loraq.errors import LoraqError
from loraq.runner.locks import Locks
from loraq.runner.session import Session
from loraq.runner.store import Store
from loraq.utils import output_folder
from loraq.utils.output_folder import check_output_folder, folder_lock, mount_options
from loraq.utils.process import several_machines


def test_a_folder_of_this_machine_is_created_and_left_empty(tmp_path, caplog):
    check_output_folder(tmp_path / "new" / "outputs", machines=True)
    assert os.listdir(tmp_path / "new" / "outputs") == [] and not caplog.records


VARIABLES = (
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    *("SLURM_STEP_NUM_NODES", "SLURM_ARRAY_TASK_COUNT"),
)


def no_effect(*_given) -> None:
    """flock on a file system that accepts locks and forgets them."""


def no_locks(*_given) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


@pytest.mark.parametrize("flock", [no_effect, no_locks])
def test_a_folder_whose_locks_do_not_hold_is_refused(tmp_path, monkeypatch, flock):
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(LoraqError, match=r"no locks \(flock\).*Mount it with locks.*output=FOLDER"):
        check_output_folder(tmp_path)
    assert os.listdir(tmp_path) == []


MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
31 22 0:40 / /net rw,relatime - nfs4 server:/ rw,vers=4.2,local_lock=none
32 22 0:41 / /net/old\\040one rw,noatime - nfs server:/old rw,vers=3,nolock,local_lock=all
"""


def test_locks_that_only_this_machine_sees_are_told(tmp_path, monkeypatch, caplog):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    assert mount_options(tmp_path, mounts) == {"ext4", "rw", "relatime"}
    assert "nolock" not in mount_options(tmp_path.__class__("/net/oldest"), mounts)
    assert "nolock" in mount_options(tmp_path.__class__("/net/old one/outputs"), mounts)
    mounts.write_text(f"40 22 0:42 / {tmp_path.resolve()} rw - nfs server:/ rw,local_lock=flock\n")
    monkeypatch.setattr(output_folder, "MOUNTS", mounts)
    check_output_folder(tmp_path)
    assert "local_lock=flock; use it from one machine at a time" in caplog.text
    with pytest.raises(LoraqError, match=r"local_lock=flock.*several machines.*all machines see"):
        check_output_folder(tmp_path, machines=True)


@pytest.mark.parametrize(
    ("line", "local"),
    [
        ("lustre 10.0.0.1@tcp:/scratch rw,localflock", "localflock"),
        ("gfs2 /dev/mapper/data rw,localflocks", "localflocks"),
        ("cifs //server/data rw,nobrl", "nobrl"),
        ("fuse.sshfs user@host: rw,user_id=0", "fuse.sshfs"),
        ("lustre 10.0.0.1@tcp:/scratch rw,flock", None),
    ],
)
def test_a_run_on_several_machines_needs_locks_that_all_see(tmp_path, monkeypatch, line, local):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"40 22 0:42 / {tmp_path.resolve()} rw - {line}\n")
    monkeypatch.setattr(output_folder, "MOUNTS", mounts)
    store = Store(tmp_path / "outputs")
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    Session(store)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    if local is None:
        Session(store)
        return
    with pytest.raises(LoraqError, match=f"mounted with {local}, and this run is on several"):
        Session(store)


@pytest.mark.parametrize(
    ("launcher", "several"),
    [
        ({}, False),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}, False),
        ({"WORLD_SIZE": "8", "LOCAL_RANK": "0"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, True),
        ({"SLURM_STEP_NUM_NODES": "1", "SLURM_ARRAY_TASK_COUNT": "1"}, False),
        ({"SLURM_STEP_NUM_NODES": "2"}, True),
        ({"SLURM_ARRAY_TASK_COUNT": "9"}, True),
    ],
)
def test_launchers_tell_how_many_machines_take_part(monkeypatch, launcher, several):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    assert several_machines() is several


WITHOUT_FLOCK = """
import errno, fcntl, os, sys
from pathlib import Path
def flock(*given):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
fcntl.flock = flock
from loraq.errors import LoraqError
from loraq.runner.locks import Locks
from loraq.runner.locks import Locks
from loraq.utils.output_folder import check_output_folder
root = Path(sys.argv[1])
(root / "images").mkdir()
for use in (lambda: check_output_folder(root), lambda: Locks(root).in_use("images", "k")):
    try:
        use()
    except LoraqError as error:
        print(error)
"""


def test_without_flock_a_run_is_refused_and_nothing_is_locked(tmp_path):
    """filelock would make a file whose existence is the lock, which a dead process leaves."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_FLOCK, str(tmp_path)], capture_output=True, text=True
    )
    run, lock = done.stdout.splitlines()
    assert "its file system has no locks (flock)" in run and "Lustre: flock" in run
    assert "its file system lacks a function" in lock and "output=FOLDER" in lock
    assert not done.stderr and not Locks(tmp_path).in_use("images", "k")


def test_the_lock_of_a_folder_waits_for_the_one_that_holds_it(tmp_path):
    entered = threading.Event()

    def other() -> None:
        with folder_lock(tmp_path / "results"):
            entered.set()

    with folder_lock(tmp_path / "results"):
        thread = threading.Thread(target=other)
        thread.start()
        assert not entered.wait(0.2)
    thread.join()
    assert entered.is_set()
