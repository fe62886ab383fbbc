"""Exact re-parametrisations of a layer's (x, W): shift, smoothing, block Hadamard, in this order.

    x̃ = ((x + c) / s) · D·H        W̃ = (W · s) · D·H        bias̃ = bias − c · W·1

In exact arithmetic x̃·W̃ᵀ + bias̃ = x·Wᵀ + bias. Everything a transform needs at run time is a tensor
held by the layer and is counted in the budget.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loraq.transforms.hadamard import rotate, rotate_back

GELU_SHIFT = 0.171875
"""−min of GELU is 0.17: x + 0.171875 ≥ 0, so unsigned codes lose nothing (deepcompressor)."""


@dataclass(frozen=True)
class InputTransform:
    """The transform of one layer; `None` / 0 means that part is absent.

    smooth_I: float32 values that are representable in bfloat16 (how they are stored);
    signs_I: int8 ±1; block: Hadamard block; shift: c above.
    """

    smooth_I: Tensor | None = None
    signs_I: Tensor | None = None
    block: int = 0
    shift: float = 0.0

    @property
    def identity(self) -> bool:
        """Whether x̃ is x."""
        return not self.shift and self.smooth_I is None and self.signs_I is None

    def input(self, x: Tensor) -> Tensor:
        """x̃ from x, over the last axis."""
        if self.shift:
            x = x + self.shift
        if self.smooth_I is not None:
            x = x / self.smooth_I
        if self.signs_I is not None:
            x = rotate(x, self.signs_I, self.block)
        return x

    def weight(self, w_OI: Tensor) -> Tensor:
        """W̃ from W, over the last axis."""
        if self.smooth_I is not None:
            w_OI = w_OI * self.smooth_I
        if self.signs_I is not None:
            w_OI = rotate(w_OI, self.signs_I, self.block)
        return w_OI

    def weight_back(self, w_OI: Tensor) -> Tensor:
        """W from W̃: errors are reported in the original basis."""
        if self.signs_I is not None:
            w_OI = rotate_back(w_OI, self.signs_I, self.block)
        if self.smooth_I is not None:
            w_OI = w_OI / self.smooth_I
        return w_OI

    def moment(self, second_BII: Tensor, mean_BI: Tensor) -> Tensor:
        """E[x̃ᵀx̃] from E[xᵀx] and E[x] of a batch of inputs (this transform with axes (B, 1, I))."""
        if self.shift:
            crossed = mean_BI[:, :, None] + mean_BI[:, None, :]
            second_BII = second_BII + self.shift * crossed + self.shift**2
        unshifted = replace(self, shift=0.0)  # x̃ is linear in x + c: the same map on both axes
        return unshifted.input(unshifted.input(second_BII).mT)

    def bias(self, bias_O: Tensor | None, w_OI: Tensor) -> Tensor | None:
        """bias̃ = bias − c·W·1 with the 16-bit W (float64 sum), or the bias as it was."""
        if not self.shift:
            return bias_O
        folded_O = self.shift * w_OI.double().sum(-1)
        base_O = 0.0 if bias_O is None else bias_O.double()
        return (base_O - folded_O).float()

    def tensors(self) -> dict[str, Tensor]:
        """What is stored: smoothing in bfloat16, signs as bits (8 per byte)."""
        out: dict[str, Tensor] = {}
        if self.smooth_I is not None:
            out["smooth"] = self.smooth_I.to(torch.bfloat16)
        if self.signs_I is not None:
            out["signs"] = pack_bits(self.signs_I > 0)
        return out

    def to(self, device: torch.device | str, dtype: torch.dtype) -> InputTransform:
        """The transform on a device, with smoothing scales in `dtype`."""
        return replace(
            self,
            smooth_I=None if self.smooth_I is None else self.smooth_I.to(device, dtype),
            signs_I=None if self.signs_I is None else self.signs_I.to(device),
        )

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @classmethod
    def from_tensors(
        cls, tensors: dict[str, Tensor], width: int, block: int, shift: float
    ) -> InputTransform:
        """Inverse of `tensors()` for a layer that reads `width` channels."""
        smooth, signs = tensors.get("smooth"), tensors.get("signs")
        return cls(
            smooth_I=None if smooth is None else smooth.float(),
            signs_I=None if signs is None else unpack_bits(signs, width).to(torch.int8) * 2 - 1,
            block=block,
            shift=shift,
        )


def pack_bits(bits_I: Tensor) -> Tensor:
    """Eight booleans a byte, the first in the lowest bit; a short end is filled with zeros."""
    padded = torch.nn.functional.pad(bits_I.to(torch.uint8), (0, -bits_I.numel() % 8))
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=bits_I.device)
    return (padded.view(-1, 8) * powers).sum(-1, dtype=torch.int32).to(torch.uint8)


def unpack_bits(bytes_: Tensor, count: int) -> Tensor:
    """Inverse of `pack_bits`: the first `count` bits as booleans."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bytes_.device)
    return ((bytes_[:, None] >> shifts) & 1).flatten()[:count].bool()
