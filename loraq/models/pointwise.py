"""A 1×1 convolution is a linear map over channels: the same weight matrix, channels on axis 1."""

from __future__ import annotations

from torch import Tensor, nn


def weight_matrix(module: nn.Module) -> Tensor:
    """(out, in) weight of a linear or of a 1×1 convolution, detached.

    A module whose stored weight is wider than the model's type says so in `held_as`
    (`mapped_transformer`).
    """
    weight: Tensor = module.weight.detach()  # type: ignore[assignment, operator]
    return weight.flatten(1).to(getattr(module, "held_as", weight.dtype))


def channels_last(module: nn.Module, x: Tensor) -> Tensor:
    """What `module` reads or gives, as tokens × channels: a convolution's axis 1 goes last."""
    return x.movedim(1, -1) if isinstance(module, nn.Conv2d) else x
