"""A two-block stack of linears with PixArt's roles, small enough to quantise in milliseconds."""

from __future__ import annotations

import torch
from torch import nn

from loraq.models import Layer

SHAPES = {
    "to_q": ("self_q", 32, 32), "to_k": ("self_k", 32, 32), "to_v": ("self_v", 32, 32),
    "to_out": ("self_out", 32, 32), "up": ("ff_up", 64, 32), "down": ("ff_down", 32, 64),
}  # fmt: skip


class Toy(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({n: nn.Linear(i, o) for n, (_, o, i) in SHAPES.items()}) for _ in range(2)
        )
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=g) * 0.2
            if p.dim() == 2:
                u = torch.randn(p.shape[0], 4, generator=g)
                p.data += 0.3 * u @ torch.randn(4, p.shape[1], generator=g)

    def forward(self, x):
        for block in self.blocks:
            q, k, v = (block[n](x) for n in ("to_q", "to_k", "to_v"))
            x = x + block["to_out"](torch.softmax(q @ k.mT / 6, -1) @ v)
            x = x + block["down"](nn.functional.gelu(block["up"](x)))
            x = x / x.std()
        return x


def toy_layers() -> list[Layer]:
    group = {"to_q": "qkv", "to_k": "qkv", "to_v": "qkv"}
    return [
        Layer(f"blocks.{b}.{n}", role, (o, i), f"blocks.{b}.{group.get(n, n)}", role == "ff_down")
        for b in range(2)
        for n, (role, o, i) in SHAPES.items()
    ]


def toy_inputs(model: Toy, rows: int = 64, seed: int = 0) -> dict[str, torch.Tensor]:
    from loraq.quantization.calibration import InputCapture

    g = torch.Generator().manual_seed(seed)
    with torch.no_grad(), InputCapture(model, toy_layers(), rows, 2, seed) as capture:
        for _ in range(2):
            model(torch.randn(4, 16, 32, generator=g) * torch.linspace(0.3, 3, 32))
    return capture.inputs()
