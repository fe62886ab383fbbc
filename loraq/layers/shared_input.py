"""q, k and v read the same x, which is quantised once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Quantized = TypeVar("Quantized")


def apply_keeping_dtype(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """`fn(tensor)` on its new device, but in the tensor's dtype."""
    result = fn(tensor)
    return result if result.dtype == tensor.dtype else tensor.to(result.device)


class SharedInput(Generic[Quantized]):
    """The quantised input of q, k and v: computed for the first layer, released after the last.

    The layers share it if they are called with the same tensor object, once each. In-place changes
    in between are detected by the tensor's version. Inference tensors have no version and must not
    change between the calls (diffusers' attention processors do not change them).
    """

    def __init__(self, layer_count: int) -> None:
        self.layer_count = layer_count
        self._state: tuple[Tensor, tuple[int | None, type], Quantized, set[int]] | None = None
        self._moved: dict[int, tuple[Tensor, Tensor]] = {}
        self._moves = 0
        self._mover: Callable[[Tensor], Tensor] | None = None

    def __repr__(self) -> str:
        return f"SharedInput({self.layer_count} layers)"

    def get(
        self, layer: object, x: Tensor, backend: type, quantize: Callable[[], Quantized]
    ) -> Quantized:
        """The result of `quantize` for x, shared by the layers with the same type of back end."""
        if torch.compiler.is_compiling():
            return quantize()
        version = None if x.is_inference() else x._version, backend
        state = self._state
        if state is None or state[0] is not x or state[1] != version or id(layer) in state[3]:
            state = (x, version, quantize(), set())
        state[3].add(id(layer))
        self._state = None if len(state[3]) == self.layer_count else state
        return state[2]

    def move(self, tensors: Sequence[Tensor], fn: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Apply `fn` to each tensor, once for a tensor that several layers share.

        `Module.to` passes the same `fn` to all layers; a new `fn` starts a new move.
        """
        if fn is not self._mover:
            self._moved, self._moves, self._mover = {}, 0, fn
        for tensor in tensors:
            if id(tensor) not in self._moved:
                self._moved[id(tensor)] = tensor, apply_keeping_dtype(tensor, fn)
        moved = [self._moved[id(tensor)][1] for tensor in tensors]
        self._moves += 1
        if self._moves == self.layer_count:
            self._moved, self._moves, self._mover = {}, 0, None
        return moved


def share_inputs(modules: Iterable[Any]) -> None:
    """Let `QuantizedLinear`s with the same transform and R objects share their quantised input."""
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for module in modules:
        t = module.tensors
        formats = t.activation, t.branch_activation, t.requantize_intermediate
        groups.setdefault((id(t.transform), id(t.right), formats), []).append(module)
    for layers in groups.values():
        shared: SharedInput[Any] | None = SharedInput(len(layers)) if len(layers) > 1 else None
        for module in layers:
            module.shared = shared
