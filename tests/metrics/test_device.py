"""Metrics on a (simulated) GPU: on one device, with the values of the CPU, few waits a batch."""

from __future__ import annotations

import pytest
import torch

from experiments.parity.clip import write_clip
from loraq.metrics import clip_score, image_reward
from loraq.metrics.registry import compute, find_metric, kinds_of, metric_names
from tests.metrics.stand_in import write_little_image_reward
from tests.simulated import simulated_cuda


@pytest.fixture(scope="module", autouse=True)
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    write_clip(folder)
    write_little_image_reward(folder)
    with pytest.MonkeyPatch.context() as patch:
        for variable in (clip_score.VARIABLE, image_reward.VARIABLE):
            patch.setenv(variable, str(folder))
        yield


SAME = ("alignment", "frechet_reference", "kid")  # the network is that of frechet
OF_IMAGES = [name for name in metric_names() if "image" in kinds_of(find_metric(name))]
"""Of clips, snr is computed by the host, and torch.stft changes shapes in place, not simulated."""


@pytest.mark.parametrize("name", [name for name in OF_IMAGES if name not in SAME])
def test_a_metric_stays_on_one_device_and_gives_the_same(name, noisy, reference):
    def measured(device: str):
        images, other = (part.subset(range(4)) for part in (noisy, reference))
        for part in (images, other):
            part.features.clear()
        return compute(name, images, other, other, device=device, batch_size=2)

    expected = measured("cpu")
    with simulated_cuda() as device, torch.backends.cudnn.flags(enabled=False):
        found = measured("cuda")
        assert sum(device.copies.values()) > 0
        waits = sum(device.waits.values())
    assert (found.value, found.per_image) == (expected.value, expected.per_image)
    assert waits <= 8, device.report()
