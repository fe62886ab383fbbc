"""PSNR, SSIM and LPIPS: parity with the packages they follow, independence, range checks."""

from __future__ import annotations

import socket

import numpy as np
import pytest
import torch

from experiments.parity.twins import torchmetrics_lpips
from loraq.errors import LoraqError
from loraq.metrics import lpips, psnr
from loraq.metrics.common.image_set import ImageSet
from loraq.metrics.registry import compute
from tests.metrics.conftest import NAMES, draw, write

METRICS = ("psnr", "ssim", "lpips")


def tensors(images: ImageSet) -> torch.Tensor:
    return torch.cat(list(images.batches(100)))


@pytest.mark.parametrize("name", METRICS)
def test_batch_size_and_order_do_not_matter(name, noisy, reference):
    whole = compute(name, noisy, reference, batch_size=10)
    assert whole.value == pytest.approx(np.mean(whole.per_image), rel=1e-12)
    for size in (1, 3):
        other = compute(name, noisy, reference, batch_size=size)
        assert other.per_image == pytest.approx(whole.per_image, rel=1e-5, abs=1e-6)
    order = np.random.default_rng(0).permutation(len(NAMES))
    shuffled = compute(name, noisy.subset(order), reference.subset(order), batch_size=4)
    assert shuffled.per_image == pytest.approx([whole.per_image[i] for i in order], rel=1e-5)
    again = compute(name, noisy, reference, batch_size=10)
    assert again.per_image == whole.per_image  # same call, same bits


@pytest.mark.parametrize("name", METRICS)
def test_more_noise_is_worse(name, noisy, reference):
    result = compute(name, noisy, reference)
    steps = np.diff(result.per_image) * (-1 if result.direction == "higher" else 1)
    assert (steps > 0).mean() >= 0.75


def test_psnr_is_its_formula_and_torchmetrics_per_image(noisy, reference):
    from torchmetrics.image import PeakSignalNoiseRatio

    result = compute("psnr", noisy, reference)
    a, b = tensors(noisy).double() / 255, tensors(reference).double() / 255
    expected = -10 * torch.log10(((a - b) ** 2).mean((1, 2, 3)))
    assert result.per_image == pytest.approx(expected.tolist(), abs=1e-5)  # float32 log inside
    for i in (0, 7):
        metric = PeakSignalNoiseRatio(data_range=(0.0, 1.0), dim=(1, 2, 3))
        metric.update(a[i : i + 1].float(), b[i : i + 1].float())
        assert result.per_image[i] == pytest.approx(float(metric.compute()), abs=1e-4)


def test_identical_images_count_as_the_largest_finite_psnr(noisy, reference, tmp_path):
    same = compute("psnr", reference, reference)
    assert same.details["identical"] == len(NAMES) and same.value == psnr.cap(64 * 64 * 3)
    nearly = draw(0).copy()
    nearly[5, 5, 1] += 1
    one = write(tmp_path, {"shape_0": nearly})
    result = compute("psnr", one, reference)
    assert result.details["identical"] == 0
    assert result.value == pytest.approx(psnr.cap(64 * 64 * 3), abs=1e-5)


def test_ssim_is_torchmetrics_image_by_image(noisy, reference):
    from torchmetrics.image import StructuralSimilarityIndexMeasure

    result = compute("ssim", noisy, reference)
    a, b = tensors(noisy).float() / 255, tensors(reference).float() / 255
    for i in (0, 5, 9):
        metric = StructuralSimilarityIndexMeasure(data_range=1.0)
        expected = float(metric(a[i : i + 1], b[i : i + 1]))
        assert result.per_image[i] == pytest.approx(expected, abs=1e-6)
    assert compute("ssim", reference, reference).value == pytest.approx(1.0, abs=1e-4)


def test_lpips_is_torchmetrics_lpips_with_the_same_backbone(noisy, reference):
    a, b = tensors(noisy).float() / 255, tensors(reference).float() / 255
    with torch.no_grad():
        expected = torchmetrics_lpips()(a, b, normalize=True).flatten()
    result = compute("lpips", noisy, reference)
    assert result.per_image == pytest.approx(expected.tolist(), abs=1e-6)
    assert compute("lpips", reference, reference).value == 0.0


def test_lpips_downloads_nothing_and_leaves_the_random_state(monkeypatch):
    def refused(*given, **more):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refused)
    lpips.load_lpips.cache_clear()
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    network = lpips.load_lpips()
    assert torch.equal(before, torch.random.get_rng_state())
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("name", METRICS)
def test_what_cannot_be_compared_is_refused(name, noisy, reference, tmp_path):
    with pytest.raises(LoraqError, match="needs the 16-bit model's images"):
        compute(name, noisy)
    with pytest.raises(LoraqError, match="have no image in the set"):
        compute(name, noisy, reference.subset([0, 1]))
    small = write(tmp_path / "small", {n: draw(i)[:32, :32] for i, n in enumerate(NAMES)})
    with pytest.raises(LoraqError, match="compared at one size"):
        compute(name, small, reference)
    if name != "psnr":
        tiny = write(tmp_path / "tiny", {"x": draw(0)[:8, :8]})
        with pytest.raises(LoraqError, match="too small"):
            compute(name, tiny, tiny)
