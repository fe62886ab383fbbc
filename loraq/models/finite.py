"""Weights have to be in memory and finite: one NaN makes every image NaN, far from its cause."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from loraq.errors import LoraqError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def check_finite(module: nn.Module, owner: str) -> None:
    """LoraqError for the first tensor that is NaN, infinite, or on the meta device.

    Buffers that are not saved, such as masks, may be infinite. owner: the component's name.
    """
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        if tensor.is_meta:
            raise without_values(f"{owner}.{name}")
    held = module.state_dict().items()
    parts = (part for name, tensor in held for part in stored_tensors(f"{owner}.{name}", tensor))
    require_finite(dict(parts))


def stored_tensors(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The named plain tensors that a tensor consists of: itself, or those in one of its own class.

    Such tensors of torchao and quanto hold codes and scales, and do not compute sums.
    """
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        yield from stored_tensors(f"{name}.{part}", getattr(tensor, part))


def check_pipeline(pipe: Any) -> None:
    """`check_finite` of every network of a pipeline, or of an object that holds networks."""
    from torch import nn

    held = pipe.components if hasattr(pipe, "components") else vars(pipe)
    for name, component in held.items():
        if isinstance(component, nn.Module):
            check_finite(component, name)


def require_finite(tensors: Mapping[str, Tensor]) -> None:
    """LoraqError for the first tensor with NaN or infinite values, or none (meta device), by name.

    A device computes one sum per tensor, and the host waits once for all of them.
    """
    import torch

    flags: dict[torch.device, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise without_values(name)
        if tensor.is_floating_point() and tensor.element_size() > 1:  # no codes and scales
            # one pass without a copy: a sum is finite only if every term is, but it may overflow
            total = tensor.detach().sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
            flags.setdefault(tensor.device, {})[name] = total.isfinite()
    unsure = {
        name
        for held in flags.values()
        for name, finite in zip(held, torch.stack([*held.values()]).tolist(), strict=True)
        if not finite
    }
    for name in filter(unsure.__contains__, tensors):
        dtype, count = tensors[name].dtype, tensors[name].numel()
        if bad := int((~tensors[name].isfinite()).sum()):
            narrow = (
                " If they are finite in the files, they exceed float16: use bfloat16 or float32."
            )
            raise LoraqError(
                f"'{name}': {bad} of {count} values are NaN or infinite in {dtype}. Restore the "
                "model's weights." + (narrow if dtype == torch.float16 else "")
            )


def without_values(name: str) -> LoraqError:
    """The error for a tensor on the meta device."""
    return LoraqError(
        f"'{name}' is on the meta device, without values. Load the model completely, and without "
        "offloading (device_map, enable_sequential_cpu_offload)."
    )
