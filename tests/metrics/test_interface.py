"""The metrics' common interface: lookup by name, checks before anything runs, record entries."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from loraq import metrics
from loraq.errors import LoraqError
from loraq.metrics import image_reward
from loraq.metrics.common.image_set import ImageSet
from loraq.metrics.common.intervals import mean_interval
from loraq.metrics.registry import check_metrics, compute, find_metric, measure
from loraq.utils.plain import to_plain
from tests.metrics.conftest import NAMES, draw, write

ALL = [
    *("alignment", "clip_iqa", "clip_score", "frechet", "frechet_reference", "image_reward"),
    *("kid", "log_stft", "lpips", "psnr", "snr", "ssim"),
]


def test_metrics_are_the_modules_and_state_what_they_need():
    assert list(metrics.metric_names()) == ALL
    for name in ALL:
        metric = find_metric(name)
        assert name == metric.NAME and metric.VERSION.isdigit()
        assert metric.DIRECTION in ("higher", "lower")
        assert metric.NEEDS in ("reference", "real", "prompts", "images")
        assert isinstance(metric.PER_IMAGE, bool) and metric.__doc__


@pytest.mark.parametrize(
    ("constant", "value"), [("NAME", "psnrr"), ("NEEDS", "refrence"), ("DIRECTION", "up")]
)
def test_a_metric_that_does_not_state_what_it_is_is_refused(constant, value, monkeypatch):
    monkeypatch.setattr(find_metric("psnr"), constant, value)
    with pytest.raises(LoraqError, match=rf"metrics/psnr\.py: {constant} is '{value}'"):
        find_metric("psnr")


def test_unknown_names_are_answered_with_near_matches(noisy, reference):
    with pytest.raises(LoraqError, match=r"Unknown metric 'pnsr'.*'psnr'"):
        compute("pnsr", noisy, reference)
    with pytest.raises(LoraqError, match=r"batchsize.*batch_size"):
        compute("psnr", noisy, reference, batchsize=4)
    for given, words in (
        ({"batch_size": 0}, "batch_size = 0"),
        ({"bootstrap": 5}, "bootstrap = 5"),
    ):
        with pytest.raises(LoraqError, match=words):
            compute("psnr", noisy, reference, **given)
    with pytest.raises(LoraqError, match="needs real images"):
        compute("kid", noisy, reference)
    with pytest.raises(LoraqError, match="needs the prompts"):
        compute("alignment", ImageSet(noisy.paths, noisy.names))


def test_check_speaks_before_anything_runs(monkeypatch, tmp_path):
    for name in (image_reward.VARIABLE, "LORAQ_INCEPTION_WEIGHTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    check_metrics(["psnr", "lpips", "ssim", "frechet", "kid"], 2, 64)
    with pytest.raises(LoraqError, match=r"96 MB(.|\n)*--only fid(.|\n)*LORAQ_INCEPTION_WEIGHTS"):
        check_metrics(["psnr", "kid"], 2, 64, extractor="inception")
    with pytest.raises(LoraqError, match=r"ImageReward\.pt.*1\.8 GB(.|\n)*LORAQ_IMAGE_REWARD"):
        check_metrics(["image_reward"], 2, 64)
    monkeypatch.delenv("HF_HUB_OFFLINE")  # then a run downloads them
    check_metrics(["image_reward"], 2, 64)


@pytest.fixture(scope="module")
def entries(noisy, reference):
    return measure(["psnr", "frechet", "kid"], noisy, reference, real=reference, bootstrap=500)


def test_measure_gives_record_entries_with_intervals(entries, noisy, reference):
    psnr = entries["psnr"]
    expected = mean_interval(psnr["per_image"])
    assert (psnr["value"], psnr["lo"], psnr["hi"]) == pytest.approx(expected)
    assert psnr["n"] == len(NAMES) == len(psnr["per_image"]) and psnr["direction"] == "higher"
    assert psnr["version"] == find_metric("psnr").VERSION
    assert set(psnr["details"]["packages"]) == {"torchmetrics"}
    distance, kid = entries["fd_efflite0"], entries["kid_efflite0"]
    assert distance["lo"] is None and distance["reason"] and distance["per_image"] is None
    assert (
        kid["lo"] is None
        and kid["reason"] == "too few images (N < 32) for an interval by resampling"
    )
    assert to_plain(entries)  # a record can hold it


def test_seen_and_held_out_are_measured_apart(entries, noisy, reference):
    psnr = entries["psnr"]
    assert psnr["seen"]["value"] == pytest.approx(np.mean(psnr["per_image"][::2]))
    assert psnr["held_out"]["value"] == pytest.approx(np.mean(psnr["per_image"][1::2]))
    odd = range(1, len(NAMES), 2)
    alone = compute("kid", noisy.subset(odd), real=reference.subset(odd), bootstrap=500)
    held_out = entries["kid_efflite0"]["held_out"]
    assert (held_out["value"], held_out["n"]) == (pytest.approx(alone.value, rel=1e-9), 5)
    assert held_out["lo"] is None and "too few images" in held_out["reason"]
    only = measure(["psnr"], noisy.subset(odd), reference)["psnr"]
    assert "seen" not in only and "held_out" not in only


def test_the_reference_row_says_why_it_has_no_paired_metrics(reference):
    found = measure(["psnr", "frechet_reference"], reference)
    assert list(found) == ["psnr", "fd_reference_efflite0"]  # as in the other rows
    for entry in found.values():
        assert entry["value"] is None and "compared with" in entry["reason"]


def test_images_are_read_exactly_and_odd_ones_refused(tmp_path):
    images = write(tmp_path, {"a": draw(1), "b": draw(2)})
    assert (images.read(1) == draw(2)).all()
    for mode in ("RGBA", "L", "I;16"):
        Image.new(mode, (64, 64)).save(tmp_path / "b.png")
        with pytest.raises(LoraqError, match=r"b\.png is .*8-bit RGB"):
            list(images.batches(2))
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    with pytest.raises(LoraqError, match="cannot read the image"):
        images.read(1)
    (tmp_path / "b.png").unlink()
    with pytest.raises(LoraqError, match="does not exist"):
        images.read(1)
    with pytest.raises(LoraqError, match="come twice"):
        ImageSet(images.paths, ("a", "a"))


def test_the_hash_of_a_set_is_of_names_order_and_bytes(tmp_path):
    one = write(tmp_path / "1", {"a": draw(1), "b": draw(2)})
    same = write(tmp_path / "2", {"a": draw(1), "b": draw(2)})
    other = write(tmp_path / "3", {"a": draw(1), "b": draw(3)})
    assert one.hash == same.hash and len({one.hash, other.hash, one.subset([1, 0]).hash}) == 3


def test_psnr_of_all_identical_images_has_a_finite_interval(reference):
    entry = measure(["psnr"], reference, reference)["psnr"]
    assert math.isfinite(entry["value"]) and entry["lo"] == entry["hi"] == entry["value"]


def test_looking_up_metrics_needs_no_torch():
    code = (
        "import sys; from loraq import metrics;"
        "[metrics.find_metric(n) for n in metrics.metric_names()];"
        "assert not {'torch', 'torchmetrics', 'lpips', 'cleanfid', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_workers_change_no_bit_and_report_as_one_process(noisy, reference, tmp_path):
    for name in ("psnr", "frechet"):
        given = (name, noisy, reference, reference)
        alone, aided = (
            compute(
                *(g if not isinstance(g, ImageSet) else g.subset(range(len(g))) for g in given),
                batch_size=3,
                workers=workers,
            )
            for workers in (0, 2)
        )
        assert (alone.value, alone.per_image) == (aided.value, aided.per_image)
    path = tmp_path / "broken.png"
    path.write_bytes(noisy.paths[0].read_bytes()[:200])
    broken = ImageSet((path,), ("broken",))
    for workers in (0, 1):
        with pytest.raises(LoraqError, match=r"^cannot read the image .*broken.png") as caught:
            list(broken.batches(1, workers))
        assert "Traceback" not in str(caught.value)


WRONG = {
    "grey": (lambda path: Image.new("L", (64, 64)).save(path), "is L"),
    "transparent": (lambda path: Image.new("RGBA", (64, 64)).save(path), "is RGBA"),
    "no picture": (lambda path: path.write_text("x"), "cannot read the image"),
    "missing": (lambda path: None, "does not exist"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_an_image_is_said(case, reference, tmp_path):
    make, words = WRONG[case]
    path = tmp_path / f"{reference.names[0]}.png"
    make(path)
    images = ImageSet((path,), reference.names[:1])
    with pytest.raises(LoraqError, match=words):
        compute("psnr", images, reference)


def test_names_come_once_and_every_image_has_one(reference):
    with pytest.raises(LoraqError, match="these come twice"):
        ImageSet(reference.paths[:2], (reference.names[0],) * 2)
    with pytest.raises(LoraqError, match="2 images but 1 names"):
        ImageSet(reference.paths[:2], reference.names[:1])
    with pytest.raises(LoraqError, match=r"have no image in the set"):
        compute("psnr", reference, reference.subset([0]))
