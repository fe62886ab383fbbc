"""LPIPS (Zhang et al. 2018, AlexNet, v0.1) against the 16-bit model's images of the same seeds.

richzhang's `lpips` package with its heads; the backbone is a file of this package (`BACKBONE`), so
that nothing is downloaded. uint8 images are converted to [−1, 1] here.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, Final

from loraq.errors import LoraqError
from loraq.metrics.common.image_set import ImageSet, paired_batches
from loraq.metrics.common.result import (
    RESTORE,
    MetricResult,
    Options,
    mean,
    packaged_hash,
    versions,
)
from loraq.utils.assets import ASSETS, package_folder

NAME = "lpips"
VERSION = "1"
DIRECTION: Final = "lower"
NEEDS: Final = "reference"
PER_IMAGE = True
KINDS: Final = ("image", "video")
ON_DEVICE = True
BACKBONE = ASSETS / "lpips_alexnet.safetensors"
HEADS = "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0"  # sha256 of alex.pth
SMALLEST = 32  # smaller images vanish in AlexNet's two poolings


def sources(options: Options) -> dict[str, Any]:
    heads = package_folder("lpips", "lpips") / "weights/v0.1/alex.pth"
    return {
        "packages": versions("lpips", "torch", "torchvision"),
        "net": "alex 0.1",
        "heads_sha256": packaged_hash(heads, "Install the package lpips again.", HEADS),
        "backbone": BACKBONE.name,
        "backbone_sha256": packaged_hash(BACKBONE, RESTORE),
    }


def compute(images: ImageSet, reference: ImageSet, options: Options) -> MetricResult:
    import torch

    network = load_lpips(options.device)
    values: list[float] = []
    with torch.inference_mode():
        for own, other in paired_batches(images, reference, options, SMALLEST):
            distance = network(_signed(own, options), _signed(other, options))
            values += distance.flatten().double().tolist()
    return MetricResult(NAME, DIRECTION, mean(values), values)


@functools.lru_cache(maxsize=2)
def load_lpips(device: str = "cpu") -> Any:
    """The `lpips` network with the packaged backbone; LoraqError if a weight does not fit."""
    import lpips
    import torch
    from safetensors.torch import load_file

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # torchvision initialises AlexNet randomly: keep the caller's random state
        warnings.filterwarnings("ignore", message=".*parameter 'pretrained'.*")
        warnings.filterwarnings("ignore", message=".*weight enum or `None`.*")
        network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    weights = load_file(BACKBONE)
    loaded = {}
    for name, parameter in network.net.named_parameters():  # slice2.3.weight: features.3 of AlexNet
        _, layer, kind = name.split(".")
        loaded[f"features.{layer}.{kind}"] = parameter
    if set(loaded) != set(weights):
        unmatched = sorted(set(loaded) ^ set(weights))
        raise LoraqError(f"{BACKBONE.name} does not fit AlexNet: {unmatched}")
    with torch.no_grad():
        for name, parameter in loaded.items():
            parameter.copy_(weights[name])
    return network.to(device).eval().requires_grad_(False)


def _signed(images: Any, options: Options) -> Any:
    """uint8 → [−1, 1], the input range of `lpips`."""
    return images.to(options.device).float() / 127.5 - 1
