"""A packed network for nunchaku's kernels: what they cannot express, what is lost, the layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loraq.errors import LoraqError
from loraq.layouts.engine_layer import EngineLayer, engine_layer, of_one_rank
from loraq.layouts.losses import activation_loss, short, svdquant_losses
from loraq.layouts.refusals import (
    refuse_convolution,
    refuse_format,
    refuse_rotation,
    refuse_shift,
)
from loraq.layouts.targets import Source
from loraq.layouts.tiled_layer import PRECISIONS, Precision, precision_of, tensor_scales
from loraq.layouts.tiles import RANK_TILE, TILE

_RECIPES = {"int4": "int4", "nvfp4": "nvfp4", "mxfp4": "mxfp4_e2m1"}


def refuse_layer(
    source: Source, name: str, names: Sequence[str], *, pads: bool = True
) -> str | None:
    """Why the kernels cannot compute a layer, with the remedy; None if they can.

    names: of the precisions that the target has. pads: whether its reader pads widths to 128.
    """
    layer, (out, width) = source.layers[name], source.layers[name].weight.shape
    found = precision_of(layer.weight.format)
    fits = found is not None and found.name in names
    if reason := (
        refuse_rotation(layer)
        or refuse_format(layer, fits, *(f"format@quant.weight={_RECIPES[n]}" for n in names))
        or refuse_convolution(source, name)
        or refuse_shift(layer)
    ):
        return reason
    if found != precision_of(next(iter(source.layers.values())).weight.format):
        return "other layers have another format, and a file has one. Use one format@quant.weight"
    if not pads and (out % TILE or width % TILE):
        return (
            f"it has {width} inputs and {out} outputs, and both must be multiples of {TILE}. Add "
            "it to quant.skip"
        )
    return None


def source_precision(source: Source) -> Precision:
    """The one format of all layers; LoraqError if there is none."""
    found = {precision_of(layer.weight.format) for layer in source.layers.values()}
    (precision,) = found if len(found) == 1 else (None,)
    if precision is None:
        raise LoraqError(f"The layers have no one format of {', '.join(PRECISIONS)}.")
    return precision


def tiled_layers(source: Source, rank_step: int = RANK_TILE) -> dict[str, EngineLayer]:
    """All layers with one rank, a multiple of `rank_step` and at least that."""
    precision = source_precision(source)
    activation = precision.of(precision.activation, source.dtype)
    layers = {n: engine_layer(t, activation, source.dtype) for n, t in source.layers.items()}
    return of_one_rank(layers, rank_step)


def tiled_losses(source: Source) -> list[str]:
    """What a 16-bit branch and the kernels' types lose."""
    return [*svdquant_losses(source), *kernel_losses(source)]


def kernel_losses(source: Source, exact_scales: bool = False) -> list[str]:
    """What the kernels' types change. exact_scales: tensor scales are stored as they are."""
    layers = source.layers.values()
    precision = source_precision(source)
    reader = precision.of(precision.activation, source.dtype)
    found = activation_loss(source, lambda _: reader)
    errors = [
        _scale_error(t.weight.tensor_scale, source.dtype)
        for t in layers
        if t.weight.tensor_scale is not None
    ]
    if not exact_scales and errors and (worst := max(errors)):
        found.append(
            f"Tensor scales of the weights are written as a product of two numbers of "
            f"{short(source.dtype)} (relative error up to {worst:.1g})."
        )
    ranks = {0 if layer.left is None else layer.left.shape[1] for layer in layers}
    if len(ranks) > 1 or max(ranks) % RANK_TILE:
        found.append(f"Branches of rank {_span(ranks)} are padded with zeros to one rank.")
    return found


def _scale_error(scale: torch.Tensor, dtype: torch.dtype) -> float:
    rows_O, whole = tensor_scales(scale, scale.numel(), dtype, scale.device)
    stored = rows_O.float() * whole.float()
    return float((stored / scale.flatten() - 1).abs().max())


def _span(ranks: set[int]) -> str:
    return str(min(ranks)) if len(ranks) == 1 else f"{min(ranks)} to {max(ranks)}"
