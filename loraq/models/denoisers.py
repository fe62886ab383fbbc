"""The networks of a pipeline that are quantised: its transformer, or two experts (Wan 2.2).

    denoiser_of(pipe)      the transformer itself, or `Experts` over all of them
    parts(denoiser)        {"": transformer}, or {"transformer": …, "transformer_2": …}

Layers of experts have the name of their component in front: "transformer_2.blocks.0.attn1.to_q".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from loraq.errors import LoraqError
from loraq.models.component_names import denoiser_names

TRANSFORMER = "transformer"
"""The component of a pipeline with one denoiser."""


class Experts(nn.ModuleDict):
    """The transformers of a pipeline that has several; each forward runs one of them."""

    def __repr__(self) -> str:
        kinds = ", ".join(f"{name}: {type(net).__name__}" for name, net in self.items())
        return f"Experts({kinds})"

    @property
    def dtype(self) -> torch.dtype:
        """That of the first expert."""
        return dtype_of(next(iter(self.values())))


def dtype_of(network: nn.Module) -> torch.dtype:
    """The type that a network computes in; some classes keep single tensors in float32 (Wan)."""
    stated = getattr(network, "dtype", None)
    return stated if isinstance(stated, torch.dtype) else next(network.parameters()).dtype


def denoiser_of(pipe: Any) -> nn.Module:
    """The transformer of a loaded pipeline, or `Experts` of several; LoraqError without one."""
    return gathered(denoisers_of(pipe), type(pipe).__name__)


def denoisers_of(pipe: Any) -> dict[str, nn.Module]:
    """The transformers of a loaded pipeline by the names of their components.

    Of an object without components, which is no pipeline of diffusers, its `transformer`.
    """
    names = denoiser_names(getattr(pipe, "components", (TRANSFORMER,)))
    held = {name: getattr(pipe, name, None) for name in names}
    return {name: net for name, net in held.items() if isinstance(net, nn.Module)}


def device_of(pipe: Any) -> str:
    """The kind of device that a loaded pipeline's denoiser runs on, "cpu" or "cuda"."""
    network = next(iter(parts(denoiser_of(pipe)).values()))
    hooks = (getattr(module, "_hf_hook", None) for module in network.modules())  # offloading
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    offloaded = next((device for device in devices if device is not None), None)
    device = next(network.parameters()).device if offloaded is None else torch.device(offloaded)
    return device.type


def gathered(denoisers: Mapping[str, nn.Module], owner: str) -> nn.Module:
    """One transformer as it is, several as `Experts`; LoraqError for none of `owner`.

    denoisers: by the names of their components.
    """
    if not denoisers:
        raise LoraqError(
            f"{owner} has no transformer. LoRaQ quantises diffusion transformers: "
            "load a pipeline that has one, with all of its components."
        )
    return next(iter(denoisers.values())) if len(denoisers) == 1 else Experts(dict(denoisers))


def parts(denoiser: nn.Module) -> dict[str, nn.Module]:
    """The transformers by the prefix of their layers' names, without the dot; "" for one alone."""
    return dict(denoiser.items()) if isinstance(denoiser, Experts) else {"": denoiser}


def step_of(pipe: Any, call: int) -> int:
    """The denoising step, from 0, in which the denoiser is called for the time `call`, from 0.

    The pipeline's scheduler counts them, since a step may take several calls; without a count
    there, each call is a step.
    """
    scheduler: Any = getattr(pipe, "scheduler", None)
    if hasattr(scheduler, "step_index"):
        return scheduler.step_index or 0  # None before the first step
    return call


def same_parts(one: nn.Module, other: nn.Module | None) -> bool:
    """Whether both are the same transformers, also as two `Experts` over them."""
    if other is None:
        return False
    return [*map(id, parts(one).values())] == [*map(id, parts(other).values())]


def joined(part: str, name: str) -> str:
    """The name of a layer of a part: ("transformer_2", "blocks.0") → "transformer_2.blocks.0"."""
    return f"{part}.{name}" if part else name


def of_part(values: Mapping[str, Any], part: str) -> dict[str, Any]:
    """The entries of one part, by their names inside it."""
    start = f"{part}." if part else ""
    return {name.removeprefix(start): v for name, v in values.items() if name.startswith(start)}
