"""One layer in the coordinates of SVDQuant's readers: a 4-bit main path and a 16-bit branch.

    LoRaQ    y = Qa(x̃)·W̃ᵀ + Qba(Qba(x̃)·Rᵀ)·Lᵀ + b̃        x̃ = (x + c) / s
    readers  y = Qa(x̃)·W̃ᵀ + (x·down)·upᵀ + b

    down = (R / s)ᵀ        up = L        b = b̃ + c·L·(R / s)·1

The branch of readers has the raw input, so its down-projection takes the division by s, and the
bias gives back what the shift c added to LoRaQ's branch. Letters: I in, O out, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from loraq.errors import LoraqError
from loraq.formats import Format, QuantizedTensor, dequantize
from loraq.formats.table import ScaleFormat
from loraq.layers.tensors import LayerTensors

BranchInput = Literal["raw", "smoothed"]
BFLOAT16 = "Export with dtype=bfloat16 (on the command line --dtype bfloat16)"
SCALE_NAMES: dict[torch.dtype, ScaleFormat] = {torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class EngineLayer:
    """What one layer of a file tells its reader.

    weight: W̃, as codes, or as values (O, I) where they fit no format of ours.
    activation: what the reader rounds x̃ to, in blocks of each row.
    dtype: the 16-bit type that the reader computes in.
    input_scale: a static scale of the activations, of nvfp4 alone; else they are dynamic.
    smooth_I: s, which divides x on the main path. shift: c, added before that.
    multiply_I: 1/s, by which other readers multiply x instead.
    signed_inputs: the first inputs that are neither shifted nor rounded to unsigned codes.
    rotation: block of the regular Hadamard matrix that the reader multiplies x̃ by; 0: none.
    branch_input: whether x or x̃ goes into the branch.
    intermediate: the type of x·down, between the branch's products.
    """

    weight: QuantizedTensor | Tensor
    activation: Format
    dtype: torch.dtype
    input_scale: Tensor | None = None
    smooth_I: Tensor | None = None
    multiply_I: Tensor | None = None
    rotation: int = 0
    shift: float = 0.0
    signed_inputs: int = 0
    down_IR: Tensor | None = None
    up_OR: Tensor | None = None
    branch_input: BranchInput = "raw"
    intermediate: torch.dtype = torch.float32
    bias_O: Tensor | None = None

    def __repr__(self) -> str:
        weight = self.weight.format.label if isinstance(self.weight, QuantizedTensor) else "values"
        return (
            f"EngineLayer(shape={tuple(self.weight.shape)}, weight={weight}, "
            f"activation={self.activation.label}, rank={self.rank})"
        )

    @property
    def rank(self) -> int:
        """Of the branch; 0 without one."""
        return 0 if self.up_OR is None else self.up_OR.shape[1]

    @property
    def device(self) -> torch.device:
        """Of the weight."""
        stored = self.weight.codes if isinstance(self.weight, QuantizedTensor) else self.weight
        return stored.device

    def divisors_I(self) -> Tensor:
        """s, or ones without smoothing."""
        if self.smooth_I is not None:
            return self.smooth_I
        return torch.ones(self.weight.shape[1], dtype=self.dtype, device=self.device)

    def multiplied(self) -> EngineLayer:
        """The same layer for a reader that multiplies by 1/s, rounded to `dtype`."""
        if self.smooth_I is None:
            return self
        return replace(self, smooth_I=None, multiply_I=(1 / self.smooth_I.float()).to(self.dtype))

    def of_rank(self, rank: int) -> EngineLayer:
        """The same layer with a branch of `rank`, padded with zeros: readers take one rank a file.

        A layer without a branch gets one of zeros. Raises LoraqError for a smaller rank.
        """
        if (extra := rank - self.rank) < 0:
            raise LoraqError(f"A branch of rank {self.rank} does not fit into rank {rank}.")
        out, width = self.weight.shape
        down_IR, up_OR = (
            torch.empty(rows, 0, dtype=self.dtype, device=self.device) if held is None else held
            for held, rows in ((self.down_IR, width), (self.up_OR, out))
        )
        return replace(self, down_IR=pad(down_IR, (0, extra)), up_OR=pad(up_OR, (0, extra)))


def of_one_rank(layers: Mapping[str, EngineLayer], step: int) -> dict[str, EngineLayer]:
    """All layers with the largest rank, rounded up to a multiple of `step` that is not 0."""
    largest = max(1, *(layer.rank for layer in layers.values()))
    return {name: layer.of_rank(-(-largest // step) * step) for name, layer in layers.items()}


def engine_layer(
    layer: LayerTensors,
    activation: Format,
    dtype: torch.dtype,
    *,
    branch_input: BranchInput = "raw",
) -> EngineLayer:
    """The layer as its readers compute it, with everything but the codes in `dtype`.

    activation: what the reader rounds to. 16-bit block scales of the weight become `dtype` too.
    Raises LoraqError for a rotated layer, and for values that `dtype` cannot hold.
    """
    transform, shift = layer.transform, layer.transform.shift
    if transform.signs_I is not None:
        raise LoraqError("its input is rotated, and the readers of these files do not rotate")
    down_IR = up_OR = None
    bias_O = layer.bias_O
    if layer.left is not None and layer.right is not None:
        up_OR, right_RI = dequantize(layer.left), dequantize(layer.right)
        if branch_input == "raw":
            right_RI = transform.weight_back(right_RI)
            if shift:
                added_O = shift * (up_OR.double() @ right_RI.double().sum(-1))
                bias_O = (added_O if bias_O is None else bias_O + added_O).float()
        down_IR = right_RI.T
    return EngineLayer(
        weight=_scales_in(layer.weight, dtype),
        activation=activation,
        dtype=dtype,
        smooth_I=_in(dtype, transform.smooth_I, "smoothing scales", positive=True),
        shift=shift,
        down_IR=_in(dtype, down_IR, "down-projection"),
        up_OR=_in(dtype, up_OR, "up-projection"),
        branch_input=branch_input,
        bias_O=_in(dtype, bias_O, "bias"),
    )


def _scales_in(weight: QuantizedTensor, dtype: torch.dtype) -> QuantizedTensor:
    """`weight` with 16-bit block scales of this type; other scales as they are."""
    if weight.scale is None or weight.scale.dtype not in SCALE_NAMES or weight.scale.dtype == dtype:
        return weight
    scale = _in(dtype, weight.scale, "block scales")
    return replace(weight, scale=scale, format=replace(weight.format, scale=SCALE_NAMES[dtype]))


def _in(
    dtype: torch.dtype, values: Tensor | None, what: str, positive: bool = False
) -> Tensor | None:
    """`values` in a 16-bit type; LoraqError if they leave its range.

    positive: they are divisors, of which neither they nor their inverses may lose precision.
    """
    if values is None:
        return None
    held = values.to(dtype).contiguous()
    smallest = torch.finfo(dtype).smallest_normal
    if not held.isfinite().all() or (positive and not (held.minimum(1 / held) >= smallest).all()):
        low, high = values.abs().aminmax()
        raise LoraqError(
            f"its {what} reach from {float(low):.3g} to {float(high):.3g}, out of the range of "
            f"{dtype}. {BFLOAT16}"
        )
    return held
