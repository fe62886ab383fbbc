"""LPIPS (Zhang et al. 2018, AlexNet, v0.1) against the 16-bit model's images of the same seeds.

richzhang's `lpips` package with its own heads; the backbone is `loraq/assets/lpips_alexnet`, so
nothing is downloaded. Images go in as [−1, 1], made here from uint8: no other range can get in.
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from typing import Any

from loraq.errors import LoraqError
from loraq.metrics.common.image_set import ImageSet, paired_batches
from loraq.metrics.common.result import MetricResult, Options, mean, versions
from loraq.utils.assets import ASSETS

NAME = "lpips"
VERSION = "1"
DIRECTION = "lower"
NEEDS = "reference"
PER_IMAGE = True
BACKBONE = ASSETS / "lpips_alexnet.safetensors"
SMALLEST = 32  # AlexNet's two poolings leave nothing of less


def check(options: Options) -> None:
    if not BACKBONE.is_file():
        raise LoraqError(f"metric lpips: its backbone {BACKBONE.name} is missing from loraq/assets")


def compute(images: ImageSet, reference: ImageSet, options: Options) -> MetricResult:
    import torch

    check(options)
    network = load(options.device)
    values: list[float] = []
    with torch.inference_mode():
        for own, other in paired_batches(images, reference, options, SMALLEST):
            distance = network(_signed(own, options), _signed(other, options))
            values += distance.flatten().double().tolist()
    details = {
        "packages": versions("lpips", "torch"),
        "net": "alex",
        "version": "0.1",
        "backbone": BACKBONE.name,
        "backbone_sha256": hashlib.sha256(BACKBONE.read_bytes()).hexdigest(),
    }
    return MetricResult(NAME, DIRECTION, mean(values), values, details=details)


@functools.lru_cache(maxsize=2)
def load(device: str = "cpu") -> Any:
    """The `lpips` network with our backbone in it, every backbone weight given and used."""
    import lpips
    import torch
    from safetensors.torch import load_file

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # torchvision's AlexNet starts random: leave the caller's random state, and warnings, alone
        warnings.filterwarnings("ignore", message=".*parameter 'pretrained'.*")
        warnings.filterwarnings("ignore", message=".*weight enum or `None`.*")
        network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    weights = load_file(BACKBONE)
    loaded = {}
    for name, parameter in network.net.named_parameters():  # slice2.3.weight: features.3 of AlexNet
        _, layer, kind = name.split(".")
        loaded[f"features.{layer}.{kind}"] = parameter
    if set(loaded) != set(weights):
        odd = sorted(set(loaded) ^ set(weights))
        raise LoraqError(f"{BACKBONE.name} does not fit AlexNet: {odd}")
    with torch.no_grad():
        for name, parameter in loaded.items():
            parameter.copy_(weights[name])
    return network.to(device).eval().requires_grad_(False)


def _signed(images: Any, options: Options) -> Any:
    """uint8 → [−1, 1], as `lpips` wants it."""
    return images.to(options.device).float() / 127.5 - 1
