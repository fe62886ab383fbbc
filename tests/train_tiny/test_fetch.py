"""Files of the wrong hash and pickles with foreign code are refused."""

from __future__ import annotations

import pickle

import pytest

from experiments.train_tiny import fetch
from experiments.train_tiny.lpips_weights import read


def test_wrong_hash_is_refused(tmp_path):
    """The error for a modified archive contains file name and both hashes; the file is kept."""
    package = fetch.PACKAGES[0]
    archive = tmp_path / package.file
    archive.write_bytes(b"not the archive")
    with pytest.raises(ValueError, match=r"fluent-emoji-3d.*expected c1bb7eee"):
        fetch.download(package, tmp_path)
    assert archive.read_bytes() == b"not the archive"


def test_right_hash_passes(tmp_path):
    """An existing file with the right hash is used without a request to a registry."""
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    fetch.verify(path, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")


class Foreign:
    """An object whose unpickling would run code."""

    def __reduce__(self):
        """Call ``print`` on unpickling."""
        return print, ("code ran",)


def test_foreign_pickle_is_refused(tmp_path):
    """The error of the restricted unpickler contains the refused name."""
    path = tmp_path / "weights.ckpt"
    path.write_bytes(pickle.dumps({"w": Foreign()}))
    with pytest.raises(pickle.UnpicklingError, match=r"builtins\.print is not allowed"):
        read(path)
