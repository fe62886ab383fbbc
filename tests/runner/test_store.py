"""The store: products are complete or absent; corruption is detected; a full disk."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from subprocess import PIPE

import pytest

from loraq.config import FormatConfig
from loraq.errors import DiskFullError, LoraqError
from loraq.runner.store import Store
from loraq.utils.console import show_messages
from loraq.utils.files import write_bytes
from loraq.utils.hashing import key
from loraq.utils.manifest import certified_files, read_manifest, write_manifest
from loraq.utils.pieces import MANIFEST, keep_piece, remove_checksums, write_piece
from tests.damage import flip_bit
from tests.faults import compare
from tests.faults.processes import Fault, run


def test_a_key_depends_on_content_not_on_order_or_type_of_container():
    assert key({"a": 1, "b": (2, 3)}) == key({"b": [2, 3], "a": 1})
    assert key(FormatConfig("int4")) != key(FormatConfig("int4", block=32))
    assert len(key(1)) == 16


def test_a_product_exists_only_after_its_block_has_ended(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(RuntimeError), store.write("images", "k") as folder:
        write_bytes(folder / "a.png", b"1")
        raise RuntimeError
    assert not store.finished("images", "k")
    assert not list(tmp_path.glob("images/k*"))
    with store.write("images", "k", {"units": 2}) as folder:
        write_bytes(folder / "a.png", b"1")
        assert not store.finished("images", "k")
    assert store.finished("images", "k")
    assert store.manifest("images", "k")["info"]["units"] == 2


def test_a_resumable_product_keeps_its_pieces(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(KeyboardInterrupt), store.write("images", "k", resume=True) as folder:
        write_bytes(folder / "a.png", b"1")
        (folder / ".b.png.writing").write_bytes(b"half")
        raise KeyboardInterrupt
    with store.write("images", "k", resume=True) as folder:
        assert [path.name for path in folder.iterdir()] == ["a.png"]
    assert set(store.manifest("images", "k")["files"]) == {"a.png"}


def make_product() -> None:
    """A product with two pieces, as a stage makes it."""
    store = Store("outputs")
    if not store.finished("images", "k", PIECES):
        with store.write("images", "k", {"seconds": 1}, PIECES, resume=True) as folder:
            for name in PIECES:
                if not keep_piece(folder / name):
                    write_piece(folder / name, name.encode())


PIECES = ("a.png", "b.png")


def test_kill_9_while_a_product_is_finished_loses_no_piece_and_leaves_nothing_behind(tmp_path):
    for name in ("first", "whole"):  # the first also imports
        whole = tmp_path / name
        whole.mkdir()
        events = run(make_product, whole).events
    for event in range(events - 8, events + 1):
        folder = tmp_path / str(event)
        folder.mkdir()
        assert run(make_product, folder, Fault(signal.SIGKILL, event)).code == -signal.SIGKILL
        kept = compare.finished_files(folder)
        assert run(make_product, folder).code == 0
        assert compare.differences(compare.marks(folder), compare.marks(whole)) == []
        assert compare.made_again(folder, kept) == []


def test_a_piece_that_changed_after_it_was_written_is_not_certified(tmp_path):
    store = Store(tmp_path)
    with (
        pytest.raises(LoraqError, match=r"k\.partial.*1 were changed.*'b/c\.png'.*again"),
        store.write("images", "k", resume=True) as folder,
    ):
        write_piece(folder / "a.png", b"1")
        write_piece(folder / "b" / "c.png", b"12345")
        flip_bit(folder / "b" / "c.png", 3)
    assert not store.finished("images", "k")
    with store.write("images", "k", resume=True) as folder:
        assert keep_piece(folder / "a.png") and not keep_piece(folder / "b" / "c.png")
        write_piece(folder / "b" / "c.png", b"12345")
    assert store.finished("images", "k")
    files = {path.name for path in store.path("images", "k").rglob("*")}
    assert files == {"a.png", "b", "c.png", MANIFEST}


def test_a_product_without_all_pieces_of_the_plan_is_not_certified(tmp_path):
    """Something may remove pieces, or the whole folder, while the product is made."""
    store, pieces = Store(tmp_path), ["a.png", "b.png"]
    for lost in ("a.png", "."):
        with (
            pytest.raises(LoraqError, match=r"\d are missing.*'a\.png'"),
            store.write("images", "k", {}, pieces, resume=True) as folder,
        ):
            for name in pieces:
                write_piece(folder / name, b"1")
            shutil.rmtree(folder) if lost == "." else (folder / lost).unlink()
        assert store.manifest("images", "k") is None
    with (
        pytest.raises(LoraqError, match="1 are missing"),
        store.share("images", "k", {}, pieces) as to,
    ):
        write_piece(to / "a.png", b"1")
    assert not store.finished("images", "k")


def test_a_product_whose_manifest_lacks_a_planned_piece_is_made_again(tmp_path, capsys):
    show_messages()
    store = Store(tmp_path)
    with store.write("images", "k") as folder:
        write_bytes(folder / "a.png", b"1")
    assert store.finished("images", "k", ["a.png"])
    assert not store.finished("images", "k", ["a.png", "b.png"])
    assert "b.png is missing" in capsys.readouterr().err
    assert (tmp_path / "images" / "k.corrupted").is_dir()


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest", "note"])
def test_a_corrupted_product_is_reported_and_renamed(tmp_path, capsys, damage):
    show_messages()
    store = Store(tmp_path)
    with store.write("images", "k", {"units": 1}) as folder:
        write_bytes(folder / "a.png", b"12345")
    path = tmp_path / "images" / "k" / "a.png"
    if damage == "flip":
        path.write_bytes(b"12346")
    elif damage == "cut":
        path.write_bytes(b"1")
    elif damage == "remove":
        path.unlink()
    elif damage == "manifest":
        (path.parent / MANIFEST).write_text("{")
    else:
        manifest = path.parent / MANIFEST
        manifest.write_text(manifest.read_text().replace('"units"', '"unitr"'))
    assert not store.finished("images", "k")
    assert "corrupted" in capsys.readouterr().err
    assert (tmp_path / "images" / "k.corrupted").is_dir()
    assert ("images", "k") in store.corrupted
    assert not store.finished("images", "k")


def test_every_manifest_is_read_once_for_the_rates(tmp_path, monkeypatch):
    store, read = Store(tmp_path), []
    for seconds in (2.0, 4.0):
        info = {"kind": "images tiny", "units": 4, "seconds": seconds}
        with store.write("images", f"k{seconds:.0f}", info) as folder:
            write_bytes(folder / "a.png", bytes(8))
    shutil.copytree(tmp_path / "images" / "k2", tmp_path / "images" / "k2.corrupted")
    counted = lambda path: read.append(path.name) or read_manifest(path)  # noqa: E731
    monkeypatch.setattr("loraq.runner.store.read_manifest", counted)
    for _ in range(3):
        assert store.rate("images", "images tiny") == (2, 0.75, 2.0)
    assert store.rate("images", "images large") is None is store.rate("moments", "images tiny")
    info = {"kind": "images tiny", "units": 4, "seconds": 12.0}
    with store.write("images", "k12", info) as folder:
        write_bytes(folder / "a.png", bytes(20))
    assert store.rate("images", "images tiny") == (3, 1.5, 3.0)
    assert sorted(read) == ["k2", "k4"]


LOOK = """
import sys
from loraq.runner.store import Store
sys.stdin.readline()  # start all processes at the same time
print(Store(sys.argv[1]).finished("images", "k"))
"""


def test_a_corrupted_product_is_renamed_once_by_several_processes(tmp_path):
    store = Store(tmp_path)
    with store.write("images", "k") as folder:
        for number in range(50):
            write_bytes(folder / f"{number}.png", bytes(1000))
    (store.path("images", "k") / "7.png").write_bytes(b"1")
    command = [sys.executable, "-c", LOOK, str(tmp_path)]
    looking = [subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=PIPE) for _ in range(3)]
    for process in looking:
        process.stdin.write(b"\n")
        process.stdin.flush()
    outputs = [process.communicate() for process in looking]
    assert [out for out, _ in outputs] == [b"False\n"] * 3
    assert sum(err.count(b"renamed to") for _, err in outputs) == 1
    assert len(list((tmp_path / "images" / "k.corrupted").iterdir())) == 51


def test_a_product_that_was_made_again_is_not_renamed(tmp_path, monkeypatch):
    store = Store(tmp_path)
    with store.write("images", "k") as folder:
        write_bytes(folder / "a.png", b"1")
    found = iter(["a.png does not match its sha256", None])
    monkeypatch.setattr(store, "damage", lambda *_: next(found))
    assert store.finished("images", "k")
    assert store.path("images", "k").is_dir()


def test_a_full_disk_keeps_the_old_file_and_no_partial_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    write_bytes(path, b"old")

    def full(_handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError, match=r"Disk full while writing .*a\.png.*Free some"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


def test_a_product_is_locked_while_it_is_made(tmp_path):
    from filelock import FileLock, Timeout

    store = Store(tmp_path)
    with store.lock("images", "k"), pytest.raises(Timeout):
        FileLock(str(tmp_path / "images" / "k.lock")).acquire(timeout=0)
    with store.lock("images", "k"):
        pass


def test_a_piece_is_kept_while_another_process_finishes_its_product(tmp_path):
    """The finishing process removes the checksums; a piece without one is damaged otherwise."""
    pieces = [tmp_path / "a.png", tmp_path / "batches" / "0.json"]
    for path in pieces:
        path.parent.mkdir(exist_ok=True)
        write_piece(path, b"12345")
    write_manifest(tmp_path, {"files": certified_files(tmp_path, ()), "info": {}})
    remove_checksums(tmp_path)
    assert all(map(keep_piece, pieces)) and all(path.is_file() for path in pieces)
    write_manifest(tmp_path, {"files": {}, "info": {}})  # another file of that name
    assert not any(map(keep_piece, pieces)) and not any(path.is_file() for path in pieces)


def test_a_manifest_over_damaged_pieces_is_not_believed_later(tmp_path):
    store = Store(tmp_path)
    partial = tmp_path / "images" / "k.partial"
    partial.mkdir(parents=True)
    write_piece(partial / "a.png", b"12345")
    write_manifest(partial, {"files": certified_files(partial, ()), "info": {}})
    (partial / "a.png").write_bytes(b"12346")
    assert not store.finished("images", "k")
    assert not (partial / MANIFEST).exists() and not keep_piece(partial / "a.png")
