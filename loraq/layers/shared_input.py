"""q, k and v read one x: its quantised form is made once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")


def moved(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """`fn` of the tensor as far as it moves it; packed tensors keep their types."""
    other = fn(tensor)
    return other if other.dtype == tensor.dtype else tensor.to(other.device)


class SharedInput(Generic[Made]):
    """The quantised input that q, k and v read: made for the first, forgotten after the last.

    They are known to read one x where they are called with the very same tensor, once each.
    Autograd counts changes in place; inference tensors have no such count, and must not be changed
    between the calls of q, k and v (diffusers' attention processors do not).
    """

    def __init__(self, readers: int) -> None:
        self.readers = readers
        self._state: tuple[Tensor, tuple, Made, set[int]] | None = None
        self._moved: dict[int, tuple[Tensor, Tensor]] = {}
        self._moves = 0
        self._mover: Callable[[Tensor], Tensor] | None = None

    def of(self, reader: object, x: Tensor, kind: type, made: Callable[[], Made]) -> Made:
        """What `made` gives for x, made once for all readers that compute in one way (`kind`)."""
        if torch.compiler.is_compiling():
            return made()
        mark = None if x.is_inference() else x._version, kind
        state = self._state
        if state is None or state[0] is not x or state[1] != mark or id(reader) in state[3]:
            state = (x, mark, made(), set())
        state[3].add(id(reader))
        self._state = None if len(state[3]) == self.readers else state
        return state[2]

    def move(self, tensors: Sequence[Tensor], fn: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Each tensor `moved` by `fn`, one result for a tensor that several readers hold.

        `Module.to` passes one `fn` to all readers; another one means that a move ended early.
        """
        if fn is not self._mover:
            self._moved, self._moves, self._mover = {}, 0, fn
        for tensor in tensors:
            if id(tensor) not in self._moved:
                self._moved[id(tensor)] = tensor, moved(tensor, fn)
        found = [self._moved[id(tensor)][1] for tensor in tensors]
        self._moves += 1
        if self._moves == self.readers:
            self._moved, self._moves, self._mover = {}, 0, None
        return found


def share_inputs(modules: Iterable[Any]) -> None:
    """Let `QuantizedLinear`s whose stored transform and R are one object quantise x once."""
    alike: dict[tuple, list[Any]] = {}
    for module in modules:
        t = module.tensors
        formats = t.activation, t.branch_activation, t.requantize_intermediate
        alike.setdefault((id(t.transform), id(t.right), formats), []).append(module)
    for readers in alike.values():
        shared = SharedInput(len(readers)) if len(readers) > 1 else None
        for module in readers:
            module.shared = shared
