"""The module that replaces a quantised `nn.Linear` or 1×1 `nn.Conv2d`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from loraq.errors import LoraqError, unknown
from loraq.formats import QuantizedTensor
from loraq.layers.backends import COMPUTE_MODES, Compute, ComputeMode, Emulated, make_compute
from loraq.layers.shared_input import SharedInput, apply_keeping_dtype
from loraq.layers.tensors import OPERANDS, LayerTensors
from loraq.transforms.input_transform import InputTransform

InputKind = tuple[torch.dtype, torch.device]


class QuantizedLinear(nn.Module):
    """A quantised `nn.Linear` or 1×1 `nn.Conv2d` whose buffers are the packed tensors.

    Buffers are named OPERAND_SUFFIX (docs/checkpoints.md). The back end's operands (dequantised
    weights for compute=emulate) are cached at the first forward, and neither saved nor pickled.
    Moving the layer, or offloading it after each forward, releases them.
    """

    def __init__(self, tensors: LayerTensors, convolution: bool = False) -> None:
        super().__init__()
        self.convolution = convolution
        self.shared: SharedInput | None = None
        self.compute: ComputeMode = "emulate"
        self.out_features, self.in_features = tensors.weight.shape
        self.set_tensors(tensors)

    def set_tensors(self, tensors: LayerTensors) -> None:
        """Replace the packed tensors."""
        self.tensors = tensors
        for part in OPERANDS:
            packed = getattr(tensors, part)
            for suffix, tensor in ({} if packed is None else packed.tensors()).items():
                self.register_buffer(f"{part}_{suffix}", tensor)
        for suffix, tensor in tensors.transform.tensors().items():
            self.register_buffer(f"transform_{suffix}", tensor)
        self.register_buffer("bias", tensors.bias_O)
        self._cache: tuple[InputKind, InputTransform, Compute] | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the buffers; packed tensors keep their dtypes, whatever the model's dtype."""
        names = [name for name, tensor in self._buffers.items() if tensor is not None]
        buffers = [self.get_buffer(name) for name in names]
        if self.shared is None:
            moved = [apply_keeping_dtype(buffer, fn) for buffer in buffers]
        else:
            moved = self.shared.move(buffers, fn)
        for name, tensor in zip(names, moved, strict=True):
            self.register_buffer(name, tensor)
        self._read_buffers()
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._read_buffers()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": None}

    def _read_buffers(self) -> None:
        """Rebuild `tensors` from the buffers."""
        buffers, old = dict(self.named_buffers()), self.tensors

        def operand(name: str, packed: QuantizedTensor) -> QuantizedTensor:
            stored = _with_prefix(buffers, name)
            return QuantizedTensor.from_tensors(stored, packed.shape, packed.format)

        transform = InputTransform.from_tensors(
            _with_prefix(buffers, "transform"),
            self.in_features,
            old.transform.block,
            old.transform.shift,
        )
        self.tensors = replace(
            old,
            weight=operand("weight", old.weight),
            left=None if old.left is None else operand("left", old.left),
            right=None if old.right is None else operand("right", old.right),
            transform=transform,
            bias_O=buffers.get("bias"),
        )
        self._cache = None

    def forward(self, x: Tensor) -> Tensor:
        """y of x's dtype: x [..., I], or [B, I, H, W] for a convolution."""
        transform, compute = self._prepare(x)

        def quantize() -> Any:
            channels_last = x.movedim(1, -1) if self.convolution else x
            if isinstance(compute, Emulated):
                return compute.quantize(channels_last, transform)
            if not transform.identity:
                channels_last = transform.input(channels_last.to(compute.dtype))
            return compute.quantize(channels_last)

        if self.shared is None:
            quantized = quantize()
        else:
            quantized = self.shared.get(self, x, type(compute), quantize)
        y = compute.multiply(quantized).to(x.dtype)
        if getattr(getattr(self, "_hf_hook", None), "offload", False):
            self._cache = None  # accelerate takes the layer off its device after each forward
        return y.movedim(-1, 1) if self.convolution else y

    def set_compute(self, mode: ComputeMode) -> None:
        """Set the compute mode (`layers/backends.py`)."""
        self.compute, self._cache = mode, None

    def _prepare(self, x: Tensor) -> tuple[InputTransform, Compute]:
        """Transform and back end for x's dtype and device, cached for the last kind of input."""
        self._fill_cache(x.dtype, x.device)
        assert self._cache is not None
        return self._cache[1:]

    @torch.compiler.assume_constant_result
    def _fill_cache(self, *kind: *InputKind) -> bool:
        """Outside of the graph under torch.compile: Inductor dequantises short blocks wrongly."""
        if self._cache is None or self._cache[0] != kind:
            compute = make_compute(self.compute, self.tensors, *kind)
            transform = self.tensors.transform.to(kind[1], compute.dtype)
            self._cache = kind, transform, compute
        return True

    def extra_repr(self) -> str:
        """Shapes, formats and rank, as shown in the repr of a model."""
        t = self.tensors
        rank = 0 if t.left is None else t.left.shape[-1]
        return (
            f"in={self.in_features}, out={self.out_features}, weight={t.weight.format.label}, "
            f"activation={t.activation.label}, rank={rank}"
        )


def _with_prefix(buffers: dict[str, Tensor], operand: str) -> dict[str, Tensor]:
    """The buffers named OPERAND_SUFFIX, by suffix."""
    start = f"{operand}_"
    return {n.removeprefix(start): t for n, t in buffers.items() if n.startswith(start)}


def set_compute(model: nn.Module, mode: ComputeMode) -> None:
    """Set the compute mode of every packed layer of `model`: emulate, auto or triton.

    Raises LoraqError for an unknown mode, and for a model without packed layers.
    """
    if mode not in COMPUTE_MODES:
        raise unknown("compute", mode, COMPUTE_MODES)
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    if not layers:
        raise LoraqError(
            f"compute={mode} needs packed layers, and {type(model).__name__} has none. Quantise "
            "it first, or load a packed checkpoint."
        )
    for layer in layers:
        layer.set_compute(mode)
