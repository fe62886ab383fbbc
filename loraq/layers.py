"""A quantised layer: its packed tensors (`LayerTensors`) and the module that computes with them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from loraq.compute import Compute, make_compute
from loraq.formats import Format, QuantizedTensor, dequantize
from loraq.forward import quantized_linear
from loraq.shared_input import SharedInput, moved
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


class QuantizedLinear(nn.Module):
    """Stands in for `nn.Linear` or a 1×1 `nn.Conv2d`; buffers are the packed tensors.

    Buffers are called OPERAND_SUFFIX, as docs/checkpoints.md says. What `compute` multiplies with
    (dequantised weights, where it emulates) is a cache made at first use; it is no buffer, and
    neither saved nor pickled.
    """

    def __init__(self, tensors: LayerTensors, convolution: bool = False) -> None:
        super().__init__()
        self.convolution = convolution
        self.shared: SharedInput | None = None
        self.compute = "emulate"
        self.out_features, self.in_features = tensors.weight.shape
        self.hold(tensors)

    def hold(self, tensors: LayerTensors) -> None:
        """Compute with `tensors` from now on."""
        self.tensors = tensors
        for part in OPERANDS:
            packed = getattr(tensors, part)
            for suffix, tensor in ({} if packed is None else packed.tensors()).items():
                self.register_buffer(f"{part}_{suffix}", tensor)
        for suffix, tensor in tensors.transform.tensors().items():
            self.register_buffer(f"transform_{suffix}", tensor)
        self.register_buffer("bias", tensors.bias_O)
        self._cache: tuple[tuple, InputTransform, Compute] | None = None

    def _apply(self, fn, recurse=True):
        """Devices change, types never do: packed tensors are what they are in any model's dtype."""
        names = [name for name, tensor in self._buffers.items() if tensor is not None]
        held = [self.get_buffer(name) for name in names]
        shared = self.shared
        moves = [moved(t, fn) for t in held] if shared is None else shared.move(held, fn)
        for name, tensor in zip(names, moves, strict=True):
            self.register_buffer(name, tensor)
        self._read_buffers()
        return self

    def _load_from_state_dict(self, *arguments):
        super()._load_from_state_dict(*arguments)
        self._read_buffers()

    def __getstate__(self):
        return self.__dict__ | {"_cache": None}

    def _read_buffers(self) -> None:
        """Compute with the buffers as they are now."""
        held = dict(self.named_buffers())
        operands = {
            part: QuantizedTensor.from_tensors(_named(held, part), packed.shape, packed.format)
            for part in OPERANDS
            if (packed := getattr(self.tensors, part)) is not None
        }
        old = self.tensors.transform
        transform = InputTransform.from_tensors(
            _named(held, "transform"), self.in_features, old.block, old.shift
        )
        self.tensors = replace(
            self.tensors, **operands, transform=transform, bias_O=held.get("bias")
        )
        self._cache = None

    def forward(self, x: Tensor) -> Tensor:
        transform, compute = self._ready(x)

        def made() -> Any:
            last = x.movedim(1, -1) if self.convolution else x
            if not transform.identity:
                last = transform.input(last.to(compute.dtype))
            return compute.quantize(last)

        held = made() if self.shared is None else self.shared.of(self, x, type(compute), made)
        y = compute.multiply(held).to(x.dtype)
        return y.movedim(-1, 1) if self.convolution else y

    def compute_in(self, mode: str) -> None:
        """Compute in this mode of `loraq.compute` from now on."""
        self.compute, self._cache = mode, None

    def _ready(self, x: Tensor) -> tuple[InputTransform, Compute]:
        """Transform and operands for inputs of x's type on x's device; the last are kept."""
        wanted = (x.dtype, x.device)
        if self._cache is None or self._cache[0] != wanted:
            compute = make_compute(self.compute, self.tensors, *wanted)
            transform = self.tensors.transform.to(x.device, compute.dtype)
            self._cache = wanted, transform, compute
        return self._cache[1:]

    def extra_repr(self) -> str:
        t = self.tensors
        rank = 0 if t.left is None else t.left.shape[-1]
        return (
            f"in={self.in_features}, out={self.out_features}, weight={t.weight.format.label}, "
            f"activation={t.activation.label}, rank={rank}"
        )


def _named(buffers: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """The buffers called PART_SUFFIX, by suffix."""
    start = f"{part}_"
    return {n.removeprefix(start): t for n, t in buffers.items() if n.startswith(start)}
