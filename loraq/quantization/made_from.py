"""Packed layers are put only into the transformer that they were made from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from loraq.errors import LoraqError
from loraq.layers.tensors import LayerTensors
from loraq.models.denoisers import denoisers_of, gathered

SAMPLE = 64
"""Weights per layer by which a model is recognised."""
TOLERANCE = 0.01
"""Relative distance of samples of one model: it may be loaded in another 16-bit type."""


def network_of(given: Any) -> nn.Module:
    """The transformer that is given, or that of a pipeline (`Experts` of two); else LoraqError."""
    if isinstance(given, nn.Module):
        return given
    kind, networks = type(given).__name__, denoisers_of(given)
    if not networks:
        raise LoraqError(
            "Packed layers are those of a transformer or its pipeline, not of a "
            f"{kind}. Pass the pipeline."
        )
    return gathered(networks, kind)


def weight_sample(module: nn.Module) -> Tensor:
    """The first weights of a 16-bit layer, at most SAMPLE, float32 on the CPU."""
    return module.get_parameter("weight").detach()[0].flatten()[:SAMPLE].float().cpu()


def check_made_from(
    transformer: nn.Module, layers: Mapping[str, LayerTensors], samples: Mapping[str, Tensor]
) -> None:
    """LoraqError if packed layers do not fit `transformer`, by name, shape or sampled weights.

    samples: layer name → `weight_sample` of the layer that was quantised; may lack layers.
    """
    kind, modules = type(transformer).__name__, dict(transformer.named_modules())
    for name, tensors in layers.items():
        found = getattr(modules.get(name), "weight", None)
        shape = None if found is None else tuple(found.shape[:2])
        if shape != tensors.weight.shape:
            raise LoraqError(
                f"'{name}' is {tensors.weight.shape} in this quantised model and "
                f"{shape or 'missing'} in this {kind}. Apply it to the model that it was made from."
            )
        if name not in samples:
            continue
        sample = samples[name]
        if (weight_sample(modules[name]) - sample).norm() > TOLERANCE * sample.norm():
            raise LoraqError(
                f"'{name}' of this {kind} has other weights than the model that was quantised. "
                "Apply the quantised model to the model that it was made from, or quantise this "
                "one."
            )
