"""Weights have to be in memory and finite: one NaN makes every image NaN, far from its cause."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from loraq.errors import LoraqError

if TYPE_CHECKING:
    from torch import Tensor, nn


def check_finite(module: nn.Module, owner: str) -> None:
    """LoraqError for the first tensor that is NaN, infinite, or on the meta device.

    Buffers that are not saved, such as masks, may be infinite. owner: the component's name.
    """
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        if tensor.is_meta:
            raise _without_values(f"{owner}.{name}")
    for name, tensor in module.state_dict().items():
        require_finite(f"{owner}.{name}", tensor)


def check_pipeline(pipe: Any) -> None:
    """`check_finite` of every network of a diffusers pipeline."""
    from torch import nn

    for name, component in pipe.components.items():
        if isinstance(component, nn.Module):
            check_finite(component, name)


def require_finite(name: str, tensor: Tensor) -> None:
    """LoraqError if the tensor `name` has NaN or infinite values, or none (meta device)."""
    import torch

    if tensor.is_meta:
        raise _without_values(name)
    if not tensor.is_floating_point() or tensor.element_size() < 2:  # codes and scales
        return
    # one pass without a copy: a sum is finite only if every term is, but it may overflow
    total = tensor.detach().sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    if total.isfinite() or (bad := int((~tensor.isfinite()).sum())) == 0:
        return
    narrow = " If they are finite in the files, they exceed float16: use bfloat16 or float32."
    raise LoraqError(
        f"'{name}': {bad} of {tensor.numel()} values are NaN or infinite in {tensor.dtype}. "
        "Restore the model's weights." + (narrow if tensor.dtype == torch.float16 else "")
    )


def _without_values(name: str) -> LoraqError:
    return LoraqError(
        f"'{name}' is on the meta device, without values. Load the model completely, and without "
        "offloading (device_map, enable_sequential_cpu_offload)."
    )
