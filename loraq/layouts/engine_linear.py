"""A layer as the engine that reads a file computes it, emulated on any device.

    y = Qa((x + c) / s)·W̃ᵀ + (x·down)·upᵀ + b

x is rounded to the engine's 16-bit type, in which it is also shifted, divided by s and, in integer
formats, by its scale (absmax/7, of unsigned codes absmax/15). Products are summed in float32, as
tensor cores do, and y is rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from loraq.errors import LoraqError
from loraq.formats import Format, QuantizedTensor, dequantize, fake_quantize
from loraq.formats.blocks import block_length, from_blocks, to_blocks
from loraq.formats.elements import IntegerElement
from loraq.formats.scales import divisor, fake_quantize_scales, nvfp4_tensor_scale
from loraq.layers.shared_input import apply_keeping_dtype
from loraq.layouts.engine_layer import EngineLayer
from loraq.transforms.hadamard import regular_matrix


class EngineLinear(nn.Module):
    """An `EngineLayer` in place of an `nn.Linear` or 1×1 `nn.Conv2d`; buffers keep their types."""

    def __init__(self, layer: EngineLayer, convolution: bool = False) -> None:
        super().__init__()
        self.layer, self.convolution = layer, convolution
        self.out_features: int = layer.weight.shape[0]
        self.in_features: int = layer.weight.shape[1]
        for name, tensor in _tensors(layer).items():
            self.register_buffer(name, tensor)
        self._weight_OI: Tensor | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        moved = {name: apply_keeping_dtype(tensor, fn) for name, tensor in self.named_buffers()}
        for name, tensor in moved.items():
            self.register_buffer(name, tensor)
        self.layer, self._weight_OI = _with_tensors(self.layer, moved), None
        return self

    def _save_to_state_dict(self, *arguments: Any) -> None:
        raise LoraqError(
            "An emulated layer of another program's file cannot be saved. Copy the file instead."
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_weight_OI": None}

    def forward(self, x: Tensor) -> Tensor:
        """y of x's dtype: x [..., I], or [B, I, H, W] for a convolution."""
        layer = self.layer
        raw = (x.movedim(1, -1) if self.convolution else x).to(layer.dtype)
        main = _shifted(raw, layer.shift, layer.signed_inputs) if layer.shift else raw
        if layer.smooth_I is not None:
            main = main / layer.smooth_I
        if layer.multiply_I is not None:
            main = main * layer.multiply_I
        if layer.rotation:
            matrix = regular_matrix(layer.rotation).to(main)
            main = (main.unflatten(-1, (-1, layer.rotation)) @ matrix).flatten(-2)
        if self._weight_OI is None:
            held = layer.weight
            self._weight_OI = (
                dequantize(held) if isinstance(held, QuantizedTensor) else held.float()
            )
        signed = layer.signed_inputs
        rounded = round_activation(main[..., signed:], layer.activation, layer.input_scale)
        if signed:
            fmt = replace(layer.activation, name="int4", family="int")
            rounded = torch.cat([round_activation(main[..., :signed], fmt), rounded], -1)
        y = rounded @ self._weight_OI.T
        if layer.down_IR is not None and layer.up_OR is not None:
            branch = raw if layer.branch_input == "raw" else main
            inner = (branch.float() @ layer.down_IR.float()).to(layer.intermediate)
            y += inner.float() @ layer.up_OR.float().T
        if layer.bias_O is not None:
            y += layer.bias_O
        y = y.to(layer.dtype).to(x.dtype)
        return y.movedim(-1, 1) if self.convolution else y

    def extra_repr(self) -> str:
        """Shapes, formats and rank, as shown in the repr of a model."""
        return f"in={self.in_features}, out={self.out_features}, {self.layer}"


def _shifted(x: Tensor, shift: float, signed: int) -> Tensor:
    """x + shift, but for the first `signed` channels."""
    return torch.cat([x[..., :signed], x[..., signed:] + shift], -1) if signed else x + shift


def round_activation(x: Tensor, fmt: Format, input_scale: Tensor | None = None) -> Tensor:
    """x [..., I] as an engine rounds it, in float32.

    Integers: scale and quotient in x's type. Others: our own rounding, which is theirs. A block
    with NaN or Inf becomes NaN.
    """
    if fmt.family in ("int", "uint"):
        return _round_integers(x, fmt)
    if fmt.tensor_scale == "tensor" and input_scale is None:  # ComfyUI's, in x's type
        input_scale = nvfp4_tensor_scale(x.abs().amax()).float()
    if input_scale is None:
        return fake_quantize(x, fmt)
    blocks = to_blocks(x.float(), block_length(fmt, x.shape[-1]))
    scale = fake_quantize_scales(blocks.abs().amax(-1, keepdim=True), fmt, input_scale)
    return from_blocks(fmt.element.round_(blocks / divisor(scale)) * scale, x.shape[-1])


def _round_integers(x: Tensor, fmt: Format) -> Tensor:
    element = fmt.element
    assert isinstance(element, IntegerElement)
    largest, count = element.maximum_code, x.shape[-1]
    blocks = to_blocks(x, block_length(fmt, count))
    scale = blocks.abs().amax(-1, keepdim=True) / largest
    codes = (blocks / divisor(scale)).round().clamp(-largest if element.signed else 0, largest)
    return from_blocks(codes.float() * scale.float(), count)


def _tensors(layer: EngineLayer) -> dict[str, Tensor]:
    """The tensors of a layer by the names of its fields; those of a packed weight with a suffix."""
    found = {field.name: getattr(layer, field.name) for field in fields(layer)}
    if isinstance(layer.weight, QuantizedTensor):
        found |= {f"weight_{suffix}": t for suffix, t in layer.weight.tensors().items()}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def _with_tensors(layer: EngineLayer, tensors: dict[str, Tensor]) -> EngineLayer:
    """The inverse of `_tensors`."""
    names = {field.name for field in fields(layer)}
    held: dict[str, Any] = {name: t for name, t in tensors.items() if name in names}
    if isinstance(layer.weight, QuantizedTensor):
        parts = {n.removeprefix("weight_"): t for n, t in tensors.items() if n not in names}
        shape, fmt = layer.weight.shape, layer.weight.format
        held["weight"] = QuantizedTensor.from_tensors(parts, shape, fmt)
    return replace(layer, **held)
