"""An output folder is refused before a run if processes could not share it."""

from __future__ import annotations

import errno
import fcntl
import os
import threading

import pytest

from loraq.errors import LoraqError
from loraq.utils import output_folder
from loraq.utils.output_folder import check_output_folder, folder_lock, mount_options


def test_a_folder_of_this_machine_is_created_and_left_empty(tmp_path, caplog):
    check_output_folder(tmp_path / "new" / "outputs", machines=True)
    assert os.listdir(tmp_path / "new" / "outputs") == [] and not caplog.records


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
    assert mount_options(tmp_path, mounts) == {"rw", "relatime"}
    assert "nolock" not in mount_options(tmp_path.__class__("/net/oldest"), mounts)
    assert "nolock" in mount_options(tmp_path.__class__("/net/old one/outputs"), mounts)
    mounts.write_text(f"40 22 0:42 / {tmp_path.resolve()} rw - nfs server:/ rw,local_lock=flock\n")
    monkeypatch.setattr(output_folder, "MOUNTS", mounts)
    check_output_folder(tmp_path)
    assert "local_lock=flock; use it from one machine at a time" in caplog.text
    with pytest.raises(LoraqError, match=r"local_lock=flock.*that all machines see"):
        check_output_folder(tmp_path, machines=True)


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
