"""The module that stands in for a quantised `nn.Linear` or 1×1 `nn.Conv2d`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from loraq.errors import LoraqError, unknown
from loraq.formats import QuantizedTensor
from loraq.layers.backends import Compute, make_compute
from loraq.layers.shared_input import SharedInput, moved
from loraq.layers.tensors import OPERANDS, LayerTensors
from loraq.transforms.input_transform import InputTransform


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
        """Compute in this mode of `layers.backends` from now on."""
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


MODES = ("emulate", "auto", "triton")


def set_compute(model: nn.Module, mode: str) -> None:
    """Let every packed layer of `model` compute in this mode: emulate, auto or triton.

    LoraqError for an unknown mode, and for a model without packed layers.
    """
    if mode not in MODES:
        raise unknown("compute", mode, MODES)
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    if not layers:
        raise LoraqError(
            f"compute={mode} needs packed layers, and {type(model).__name__} has none. Quantise "
            "it first, or load a packed checkpoint."
        )
    for layer in layers:
        layer.compute_in(mode)
