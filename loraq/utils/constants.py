"""Caches of constant tensors, and fake tensors."""

from __future__ import annotations

from functools import _lru_cache_wrapper
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

Made = TypeVar("Made")


def unless_traced(cached: _lru_cache_wrapper[Made]) -> Callable[..., Made]:
    """A cached function that builds a tensor; while fake tensors are traced, without its cache.

    Under torch.compile, torch.export and shape checks the built tensor is fake. Later calls with
    real tensors could not use it, nor fake ones a tensor that is real.
    """
    import torch
    from torch._guards import detect_fake_mode

    if torch.compiler.is_compiling() or detect_fake_mode() is not None:
        return cached.__wrapped__
    return cached
