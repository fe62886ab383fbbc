"""The packed tensors of one quantised layer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from loraq.formats import Format, QuantizedTensor, dequantize
from loraq.layers.equation import quantized_linear
from loraq.transforms.input_transform import InputTransform

RANK_MULTIPLE = 16
"""Emulation pads the rank to a multiple of this: narrow products are slow."""
OPERANDS = ("weight", "left", "right")


@dataclass(frozen=True)
class LayerTensors:
    """The stored tensors and formats of one layer; q, k and v share one `right` object."""

    weight: QuantizedTensor
    activation: Format
    transform: InputTransform = field(default_factory=InputTransform)
    left: QuantizedTensor | None = None
    right: QuantizedTensor | None = None
    branch_activation: Format | None = None
    requantize_intermediate: bool = True
    bias_O: Tensor | None = None

    def __post_init__(self) -> None:
        if self.bias_O is not None:  # contiguous, as every stored tensor is
            object.__setattr__(self, "bias_O", self.bias_O.contiguous())

    def __repr__(self) -> str:
        rank = 0 if self.left is None else self.left.shape[-1]
        return (
            f"LayerTensors(shape={self.weight.shape}, weight={self.weight.format.label}, "
            f"activation={self.activation.label}, rank={rank}, transform={self.transform})"
        )

    def to(self, device: torch.device | str) -> LayerTensors:
        """The same layer on `device`."""
        return replace(
            self,
            weight=self.weight.to(device),
            left=None if self.left is None else self.left.to(device),
            right=None if self.right is None else self.right.to(device),
            transform=self.transform.to(device, torch.float32),
            bias_O=None if self.bias_O is None else self.bias_O.to(device),
        )

    def effective_weight(self) -> Tensor:
        """Ŵ = Wq + L·R in the original basis, float32 (O, I)."""
        w_OI = dequantize(self.weight)
        if self.left is not None and self.right is not None:
            w_OI = w_OI + dequantize(self.left) @ dequantize(self.right)
        return self.transform.weight_back(w_OI)

    def forward(self, x: Tensor) -> Tensor:
        """The equation in float32; dequantises the weights in every call."""
        arguments = self.equation_arguments()
        return quantized_linear(self.transform.input(x.float()), bias_O=self.bias_O, **arguments)

    def dequantized_module(self, convolution: bool, dtype: torch.dtype) -> nn.Module:
        """An `nn.Linear` or 1×1 `nn.Conv2d` with the weight Ŵ and the bias without the shift."""
        weight_OI, bias_O = self.effective_weight(), self.bias_O
        out, width = weight_OI.shape
        layer: nn.Module = nn.Linear(width, out, bias=bias_O is not None)
        if convolution:
            layer = nn.Conv2d(width, out, 1, bias=bias_O is not None)
        values = {"weight": weight_OI[..., None, None] if convolution else weight_OI}
        if bias_O is not None:
            values["bias"] = bias_O + self.transform.shift * weight_OI.double().sum(-1).float()
        layer.load_state_dict(values)
        return layer.to(weight_OI.device, dtype).requires_grad_(False)

    def equation_arguments(self) -> dict[str, Any]:
        """The arguments of `quantized_linear`, with weights dequantised to float32.

        L and R are zero-padded to a multiple of RANK_MULTIPLE, which does not change the values.
        """
        right_RI = left_OR = None
        if self.right is not None and self.left is not None:
            right_RI, left_OR = dequantize(self.right), dequantize(self.left)
            extra = -right_RI.shape[0] % RANK_MULTIPLE
            right_RI, left_OR = pad(right_RI, (0, 0, 0, extra)), pad(left_OR, (0, extra))
        return {
            "weight_OI": dequantize(self.weight),
            "activation": self.activation,
            "right_RI": right_RI,
            "left_OR": left_OR,
            "branch_activation": self.branch_activation,
            "requantize_intermediate": self.requantize_intermediate,
        }
