"""The transform of a layer's (x, W): shift, smoothing and block Hadamard, in this order.

    x̃ = ((x + c) / s) · D·H        W̃ = (W · s) · D·H        bias̃ = bias − c · W·1

In exact arithmetic x̃·W̃ᵀ + bias̃ = x·Wᵀ + bias. The layer stores the tensors of its transform, and
the budget counts them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loraq.transforms.hadamard import rotate, rotate_back

GELU_SHIFT = 0.171875
"""min GELU = −0.17, so GELU(x) + 0.171875 ≥ 0 fits unsigned codes (as in deepcompressor)."""


@dataclass(frozen=True)
class InputTransform:
    """The transform of one layer; None or 0 disables a part.

    smooth_I: s, float32 values that are representable in bfloat16, the stored dtype.
    signs_I: the diagonal of D, int8 ±1.
    block: size of the Hadamard blocks.
    shift: c.
    """

    smooth_I: Tensor | None = None
    signs_I: Tensor | None = None
    block: int = 0
    shift: float = 0.0

    def __repr__(self) -> str:
        parts = [f"shift={self.shift}"] if self.shift else []
        if self.smooth_I is not None:
            parts.append(f"smooth={self.smooth_I.shape[-1]} channels")
        if self.signs_I is not None:
            parts.append(f"hadamard={self.block}")
        return f"InputTransform({', '.join(parts) or 'identity'})"

    @property
    def identity(self) -> bool:
        """Whether x̃ = x."""
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
        """W from W̃, the inverse of `weight`."""
        if self.signs_I is not None:
            w_OI = rotate_back(w_OI, self.signs_I, self.block)
        if self.smooth_I is not None:
            w_OI = w_OI / self.smooth_I
        return w_OI

    def moment(self, second_BII: Tensor, mean_BI: Tensor) -> Tensor:
        """E[x̃ᵀx̃] from E[xᵀx] and E[x] of a batch of inputs; this transform has axes (B, 1, I)."""
        if self.shift:
            cross = mean_BI[:, :, None] + mean_BI[:, None, :]
            second_BII = second_BII + self.shift * cross + self.shift**2
        unshifted = replace(self, shift=0.0)  # linear in x + c, so it applies to both axes
        return unshifted.input(unshifted.input(second_BII).mT)

    def bias(self, bias_O: Tensor | None, w_OI: Tensor) -> Tensor | None:
        """bias̃ = bias − c·W·1 with the 16-bit W (summed in float64); unchanged without a shift."""
        if not self.shift:
            return bias_O
        folded_O = self.shift * w_OI.double().sum(-1)
        base_O = 0.0 if bias_O is None else bias_O.double()
        return (base_O - folded_O).float()

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors: `smooth` in bfloat16, `signs` as bits (8 per byte)."""
        stored: dict[str, Tensor] = {}
        if self.smooth_I is not None:
            stored["smooth"] = self.smooth_I.to(torch.bfloat16)
        if self.signs_I is not None:
            stored["signs"] = pack_bits(self.signs_I > 0)
        return stored

    def to(self, device: torch.device | str, dtype: torch.dtype) -> InputTransform:
        """The transform on `device`, with smoothing scales in `dtype`."""
        return replace(
            self,
            smooth_I=None if self.smooth_I is None else self.smooth_I.to(device, dtype),
            signs_I=None if self.signs_I is None else self.signs_I.to(device),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @classmethod
    def from_tensors(
        cls, tensors: dict[str, Tensor], width: int, block: int, shift: float
    ) -> InputTransform:
        """The inverse of `tensors`, for a layer with `width` input channels."""
        smooth, signs = tensors.get("smooth"), tensors.get("signs")
        return cls(
            smooth_I=None if smooth is None else smooth.float(),
            signs_I=None if signs is None else unpack_bits(signs, width).to(torch.int8) * 2 - 1,
            block=block,
            shift=shift,
        )


def pack_bits(bits_I: Tensor) -> Tensor:
    """Eight booleans per byte, the first in the lowest bit, zero-padded; uint8."""
    padded = torch.nn.functional.pad(bits_I.to(torch.uint8), (0, -bits_I.numel() % 8))
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=bits_I.device)
    return (padded.view(-1, 8) * powers).sum(-1, dtype=torch.int32).to(torch.uint8)


def unpack_bits(bytes_: Tensor, count: int) -> Tensor:
    """Inverse of `pack_bits`: the first `count` bits as booleans."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bytes_.device)
    return ((bytes_[:, None] >> shifts) & 1).flatten()[:count].bool()
