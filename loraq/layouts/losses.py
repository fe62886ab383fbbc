"""What an SVDQuant layout with a 16-bit branch loses of a LoRaQ layer, in words."""

from __future__ import annotations

from collections.abc import Callable

import torch

from loraq.formats import Format
from loraq.layers.tensors import LayerTensors
from loraq.layouts.engine_layer import SCALE_NAMES
from loraq.layouts.targets import Source
from loraq.quantization.model import QuantizedModel
from loraq.utils.console import size_text

_EPSILON = {torch.float16: "2⁻¹¹", torch.bfloat16: "2⁻⁸"}


def svdquant_losses(source: Source) -> list[str]:
    """The losses that readers with a 16-bit branch on the raw input have in common."""
    layers, dtype = source.layers.values(), source.dtype
    short, found = _short(dtype), branch_loss(source)
    factors = [(x.left.format, x.transform) for x in layers if x.left is not None]
    if any(t.smooth_I is not None or f.name != SCALE_NAMES[dtype] for f, t in factors):
        found.append(
            f"R / s and L, the factors of the branch, are rounded to {short} (relative error up to "
            f"{_EPSILON[dtype]})."
        )
    kinds = {layer.weight.scale.dtype for layer in layers if layer.weight.scale is not None}
    if kinds & set(SCALE_NAMES) - {dtype}:
        found.append(
            f"Block scales of the weights are rounded to {short} (relative error up to "
            f"{_EPSILON[dtype]}); quant.weight.scale={SCALE_NAMES[dtype]} avoids it."
        )
    found.append(f"Biases, and inputs and outputs of these layers, are in {short}.")
    return found


def activation_loss(source: Source, read: Callable[[LayerTensors], Format]) -> list[str]:
    """How many layers' inputs are rounded otherwise than here. read: what a layer's reader does."""
    layers = source.layers.values()
    pairs = [(x.activation.label, read(x).label) for x in layers if x.activation != read(x)]
    if not pairs:
        return []
    own, theirs = ("/".join(sorted(set(labels))) for labels in zip(*pairs, strict=True))
    return [f"The inputs of {len(pairs)} layers are rounded to {theirs}, not to {own}."]


def branch_loss(source: Source) -> list[str]:
    """How much larger a branch of 8 or 4 bits becomes."""
    branches = [layer for layer in source.layers.values() if layer.left is not None]
    found = []
    formats = {layer.left.format.label for layer in branches if layer.left is not None}
    if narrow := sorted(formats - set(SCALE_NAMES.values())):
        wide = sum(
            2 * x.left.shape[1] * sum(x.weight.shape) for x in branches if x.left is not None
        )
        packed = QuantizedModel(dict(source.layers)).branch_nbytes
        found.append(
            f"The branch of {len(branches)} layers is widened from {'/'.join(narrow)} to "
            f"{_short(source.dtype)}, "
            f"from {size_text(packed)} to {size_text(wide)}. Its input and its intermediate are no "
            "longer rounded."
        )
    return found


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
