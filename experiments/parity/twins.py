"""Models of the reference packages with our weights, and weight files in the published formats."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch

from experiments.parity.image_reward import pairs
from loraq.metrics import lpips


def torchmetrics_lpips() -> Any:
    """Return torchmetrics' LPIPS with AlexNet; `normalize=True` takes images in [0, 1]."""
    from safetensors.torch import load_file
    from torchmetrics.functional.image import lpips as theirs

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = theirs._NoTrainLpips(net="alex", pnet_rand=True)
    weights = load_file(lpips.BACKBONE)
    for name, parameter in twin.net.named_parameters():
        _, layer, kind = name.split(".")
        parameter.data.copy_(weights[f"features.{layer}.{kind}"])
    return twin.eval()


def golden_scores(size: str) -> dict[str, Any]:
    """Return the scores of the published ImageReward; size: base or large."""
    path = Path(pairs.__file__).parent / f"golden_{size}.json"
    return json.loads(path.read_text())


def write_image_reward(folder: Path, golden: dict[str, Any]) -> None:
    """Write ImageReward's files in the published format, with the golden scores' random weights."""
    drawn = pairs.weights(golden["shapes"], golden["seed"])
    state = {name: torch.from_numpy(values) for name, values in drawn.items()}
    torch.save(state, folder / "ImageReward.pt")
    pairs.write_med_config(folder / "med_config.json")


def write_inception(folder: Path) -> None:
    """Write TorchScript with the interface of FID's Inception: torchvision's, random weights.

    The two networks differ only in the pooling of a few branches, so their cost is the same.
    """
    from torchvision.models import inception_v3

    from loraq.metrics.common.features import INCEPTION_FILE

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            network = inception_v3(weights=None, aux_logits=False, init_weights=False)
            network.fc, network.dropout = torch.nn.Identity(), torch.nn.Identity()
            self.layers = network.eval()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x)

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, but FID's weights use it
        traced = torch.jit.trace(Network().eval(), torch.zeros(1, 3, 299, 299))
        traced.save(str(folder / INCEPTION_FILE))
