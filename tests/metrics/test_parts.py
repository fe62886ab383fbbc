"""Metrics in parts that processes share: the values of one process, each part computed once."""

from __future__ import annotations

import threading

import pytest

from loraq.metrics.common.image_set import ImageSet
from loraq.metrics.registry import compute, measure
from loraq.runner import scores
from loraq.runner.store import Store

NAMES = ("psnr", "ssim", "lpips")
OPTIONS = {"batch_size": 2}


@pytest.fixture
def made(monkeypatch):
    """The images of every part that is computed, in parts of four."""
    found, compute_part = [], scores._measured

    def counted(images, *rest):
        found.append(images.names)
        return compute_part(images, *rest)

    monkeypatch.setattr(ImageSet, "PART", 4)
    monkeypatch.setattr(scores, "_measured", counted)
    return found


def fresh(images):
    some = images.subset(range(len(images)))
    some.features.clear()
    return some


def score(folder, noisy, reference):
    images = fresh(noisy)
    product = Store(folder), ("scores", "key")
    known = scores.score_images(*product, images, fresh(reference), NAMES, ["efflite0"], OPTIONS)
    return images, known


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("scores/key/*.safetensors")}


def test_processes_share_the_parts_and_get_the_values_of_one(made, noisy, reference, tmp_path):
    whole = {name: compute(name, fresh(noisy), reference, **OPTIONS) for name in NAMES}
    images, known = score(tmp_path / "alone", noisy, reference)
    assert [len(part) for part in made] == [4, 4, 2]
    for name in NAMES:
        assert known[name] == whole[name], name  # value, every image, details with counts
    made.clear()
    found = []

    def join():
        found.append(score(tmp_path / "shared", noisy, reference))

    threads = [threading.Thread(target=join) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == sorted({*made}) and len(made) == 3  # every part once, by either
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")
    for other, values in found:
        assert values == known
        assert (other.features["efflite0"].values == images.features["efflite0"].values).all()


def test_a_record_has_the_same_entries_from_parts(made, noisy, reference, tmp_path):
    images, known = score(tmp_path, noisy, reference)
    names = ("psnr", "alignment", "frechet", "kid")
    parts = measure(names, images, reference, fresh(reference), known=known, bootstrap=100)
    alone = measure(names, fresh(noisy), reference, fresh(reference), bootstrap=100, **OPTIONS)
    assert parts == alone and list(parts["psnr"]["details"]) == list(alone["psnr"]["details"])


def test_a_damaged_part_of_an_earlier_attempt_is_made_again(made, noisy, reference, tmp_path):
    _, known = score(tmp_path, noisy, reference)
    (tmp_path / "scores" / "key").rename(tmp_path / "scores" / "key.partial")
    partial = tmp_path / "scores" / "key.partial"
    (partial / "manifest.json").unlink()
    for path in partial.glob("*.safetensors"):
        scores.write_piece(path, path.read_bytes())
    (partial / "00001.safetensors").write_bytes(b"cut")
    made.clear()
    assert score(tmp_path, noisy, reference)[1] == known
    assert [len(part) for part in made] == [4]
