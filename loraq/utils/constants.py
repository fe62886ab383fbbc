"""Constant tensors that are built once and kept for the process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVarTuple

if TYPE_CHECKING:
    from torch import Tensor

Key = TypeVarTuple("Key")


def kept(build: Callable[[*Key], Tensor]) -> Callable[[*Key], Tensor]:
    """`functools.cache` for a function that builds a constant tensor.

    Under fake tensors (torch.compile, torch.export, shape checks) the result is fake as well. It is
    built anew and not kept, because later calls with real tensors cannot use it. Kept tensors are
    no inference tensors, so that autograd can use them later.
    """
    made: dict[tuple[*Key], Tensor] = {}

    @functools.wraps(build)
    def constant(*key: *Key) -> Tensor:
        import torch
        from torch._guards import detect_fake_mode

        if torch.compiler.is_compiling() or detect_fake_mode() is not None:
            return build(*key)
        if key not in made:
            with torch.inference_mode(False):
                made[key] = build(*key)
        return made[key]

    return constant
