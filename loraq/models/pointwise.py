"""Linear layers and 1×1 convolutions, which are linear maps over the channels (axis 1), alike."""

from __future__ import annotations

from torch import Tensor, nn

from loraq.models.finite import require_finite


def weight_matrix(module: nn.Module) -> Tensor:
    """The detached weight (out, in) of a linear layer or 1×1 convolution.

    If the module has an attribute `held_as` (see `mapped_transformer`), converted to that dtype.
    """
    weight: Tensor = module.weight.detach()
    return weight.flatten(1).to(getattr(module, "held_as", weight.dtype))


def finite_weight(transformer: nn.Module, name: str) -> Tensor:
    """`weight_matrix` of the layer `name`; LoraqError if its weight or bias is not finite."""
    module = transformer.get_submodule(name)
    weight_OI, bias_O = weight_matrix(module), getattr(module, "bias", None)
    parts = {f"{name}.weight": weight_OI, f"{name}.bias": bias_O}
    require_finite({part: held for part, held in parts.items() if held is not None})
    return weight_OI


def channels_last(module: nn.Module, x: Tensor) -> Tensor:
    """An input or output of `module` as (…, channels): moves axis 1 of a convolution last."""
    return x.movedim(1, -1) if isinstance(module, nn.Conv2d) else x
