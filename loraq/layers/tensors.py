"""The packed tensors of one quantised layer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from loraq.formats import Format, QuantizedTensor, dequantize
from loraq.layers.equation import quantized_linear
from loraq.transforms.input_transform import InputTransform

RANK_MULTIPLE = 16
OPERANDS = ("weight", "left", "right")


@dataclass(frozen=True)
class LayerTensors:
    """Everything one layer stores. `right` may be the very object another layer holds (q/k/v)."""

    weight: QuantizedTensor
    activation: Format
    transform: InputTransform = field(default_factory=InputTransform)
    left: QuantizedTensor | None = None
    right: QuantizedTensor | None = None
    branch_activation: Format | None = None
    requantize_intermediate: bool = True
    bias_O: Tensor | None = None

    def to(self, device: torch.device | str) -> LayerTensors:
        """The same layer on a device; the values are those that it has here."""
        operands = {
            part: None if (packed := getattr(self, part)) is None else packed.to(device)
            for part in OPERANDS
        }
        transform = self.transform.to(device, torch.float32)
        bias_O = None if self.bias_O is None else self.bias_O.to(device)
        return replace(self, **operands, transform=transform, bias_O=bias_O)

    def effective_weight(self) -> Tensor:
        """Ŵ = Wq + L·R back in the original basis, float32 (O, I)."""
        w_OI = dequantize(self.weight)
        if self.left is not None and self.right is not None:
            w_OI = w_OI + dequantize(self.left) @ dequantize(self.right)
        return self.transform.weight_back(w_OI)

    def forward(self, x: Tensor) -> Tensor:
        """The equation on this layer, dequantised afresh: slow, exact, without a module."""
        return quantized_linear(self.transform.input(x.float()), bias_O=self.bias_O, **self.dense())

    def plain(self, convolution: bool, dtype: torch.dtype) -> nn.Module:
        """An ordinary layer with the weight Ŵ; its bias takes the transform's shift back."""
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

    def dense(self) -> dict:
        """The arguments of `quantized_linear` with weights dequantised to float32.

        The rank is filled up with zeros, which change no value: narrow products are slow otherwise.
        """
        right_RI = left_OR = None
        if self.right is not None and self.left is not None:
            right_RI, left_OR = dequantize(self.right), dequantize(self.left)
            filling = -right_RI.shape[0] % RANK_MULTIPLE
            right_RI, left_OR = pad(right_RI, (0, 0, 0, filling)), pad(left_OR, (0, filling))
        return {
            "weight_OI": dequantize(self.weight),
            "activation": self.activation,
            "right_RI": right_RI,
            "left_OR": left_OR,
            "branch_activation": self.branch_activation,
            "requantize_intermediate": self.requantize_intermediate,
        }
