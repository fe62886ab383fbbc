"""Later processes do not read large files again, and no hash is used in doubt."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from loraq.config import ModelConfig
from loraq.models.source import weights_hash
from loraq.utils import hashing, kept_hashes
from loraq.utils.kept_hashes import file_state, kept_hash

LATER = 3 * 10**9
"""Nanoseconds by which the tests' clock is ahead, so that files are not new."""
A, B = (hashlib.sha256(byte * 8).hexdigest() for byte in (b"a", b"b"))


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Eight bytes are large, and the file `weights` has eight; lists every reading of a file."""
    read, now, file_hash = [], hashing.time.time_ns, hashing.file_hash
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(kept_hashes, "LARGE", 8)
    monkeypatch.setattr(hashing.time, "time_ns", lambda: now() + LATER)
    monkeypatch.setattr(hashing, "file_hash", lambda p: read.append(p.name) or file_hash(p))
    (tmp_path / "weights").write_bytes(b"a" * 8)
    return read


def in_a_new_process(path: Path) -> str:
    hashing._hash_of_state.cache_clear()
    return hashing.cached_hash(path)


def entry(tmp_path: Path) -> Path:
    (found,) = (tmp_path / "home" / "loraq" / "hashes").iterdir()
    return found


def test_a_large_file_is_read_once_for_all_processes(tmp_path, read):
    path, link, small = tmp_path / "weights", tmp_path / "link", tmp_path / "small"
    link.symlink_to(path)
    small.write_bytes(b"a" * 7)
    assert [in_a_new_process(p) for p in (path, path, link)] == [A] * 3
    assert read == ["weights"]
    assert in_a_new_process(small) == in_a_new_process(small)
    assert read == ["weights", "small", "small"]


def test_other_contents_are_read_whatever_else_is_equal(tmp_path, read):
    path = tmp_path / "weights"
    assert in_a_new_process(path) == A
    before = path.stat()
    with path.open("r+b") as stream:
        stream.write(b"b" * 8)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (
        8,
        before.st_mtime_ns,
        before.st_ino,
    )
    assert in_a_new_process(path) == B == in_a_new_process(path)
    assert read == ["weights"] * 2


@pytest.mark.parametrize("damage", ["another digest", "cut", "another state", "a list"])
def test_a_damaged_entry_is_not_believed(tmp_path, read, damage):
    path = tmp_path / "weights"
    in_a_new_process(path)
    whole = entry(tmp_path).read_text()
    size = f"{len(path.read_bytes())},"
    damaged = {
        "another digest": whole.replace(A, B),
        "cut": whole[: len(whole) // 2],
        "another state": whole.replace(size, "9,"),
        "a list": "[]",
    }[damage]
    assert damaged != whole
    entry(tmp_path).write_text(damaged)
    assert in_a_new_process(path) == A and read == ["weights"] * 2
    assert entry(tmp_path).read_text() == whole


def test_a_file_that_changes_while_it_is_read_is_not_kept(tmp_path, read, monkeypatch):
    path, file_hash = tmp_path / "weights", hashing.file_hash

    def changing(read: Path) -> str:
        digest = file_hash(read)
        path.write_bytes(b"b" * 8)
        return digest

    monkeypatch.setattr(hashing, "file_hash", changing)
    in_a_new_process(path)
    assert not (tmp_path / "home").exists() and kept_hash(file_state(path)) is None


def test_the_times_of_read_only_images_are_doubtful(tmp_path, read, monkeypatch):
    path = tmp_path / "weights"
    in_a_new_process(path)
    state = file_state(path)._replace(changed=10**18)
    kept_hashes.keep_hash(state, A)
    for flag in (os.ST_RDONLY, 0):
        monkeypatch.setattr(os, "statvfs", lambda _path, flag=flag: SimpleNamespace(f_flag=flag))
        assert kept_hashes._may_be_kept(state) is (flag == 0)
        assert kept_hashes._may_be_kept(file_state(path)._replace(changed=10**18 + 1))


def test_without_a_place_for_hashes_files_are_read(tmp_path, read, monkeypatch):
    (tmp_path / "home").write_text("a file")
    assert in_a_new_process(tmp_path / "weights") == A == in_a_new_process(tmp_path / "weights")
    assert read == ["weights"] * 2


def test_the_hash_of_a_model_is_that_of_its_files_in_order(tmp_path, read):
    """Kept hashes and several readers change no key."""
    folder, total = tmp_path / "model", hashlib.sha256()
    contents = {
        "model_index.json": b'{"vae": ["diffusers", "AutoencoderKL"]}',
        "vae/b.safetensors": bytes(9),
        "vae/c.json": bytes(10),
    }
    for name, data in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        total.update(f"{name} {hashlib.sha256(data).hexdigest()}\n".encode())
    sizes = dict(height=64, width=64, steps=2, guidance=1.0, max_sequence_length=8)
    model = ModelConfig(name="tiny", path=str(folder), family="pixart_sigma", **sizes)
    for _ in range(2):
        hashing._hash_of_state.cache_clear()
        assert weights_hash(model) == total.hexdigest()
    assert len(read) == 3
