"""Constant tensors that are built once and kept for the process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, ParamSpec

if TYPE_CHECKING:
    from torch import Tensor

Arguments = ParamSpec("Arguments")


def kept(build: Callable[Arguments, Tensor]) -> Callable[Arguments, Tensor]:
    """`functools.cache` for a function that builds a constant tensor.

    Under fake tensors (torch.compile, torch.export, shape checks) the result is fake as well. It is
    built anew and not kept, because later calls with real tensors cannot use it. Kept tensors are
    no inference tensors, so that autograd can use them later.
    """

    @functools.cache
    def build_and_keep(*arguments: Arguments.args, **options: Arguments.kwargs) -> Tensor:
        import torch

        with torch.inference_mode(False):
            return build(*arguments, **options)

    @functools.wraps(build)
    def constant(*arguments: Arguments.args, **options: Arguments.kwargs) -> Tensor:
        from torch._guards import detect_fake_mode
        from torch.compiler import is_compiling

        if is_compiling() or detect_fake_mode() is not None:
            return build(*arguments, **options)
        return build_and_keep(*arguments, **options)

    return constant
