"""What an SVDQuant layout with a 16-bit branch loses of a LoRaQ layer, in words."""

from __future__ import annotations

import torch

from loraq.layouts.engine_layer import SCALE_NAMES
from loraq.layouts.targets import Source
from loraq.quantization.model import QuantizedModel
from loraq.utils.console import size_text

_EPSILON = {torch.float16: "2⁻¹¹", torch.bfloat16: "2⁻⁸"}


def svdquant_losses(source: Source) -> list[str]:
    """The losses that readers with a 16-bit branch on the raw input have in common."""
    layers, dtype = source.layers.values(), source.dtype
    branches = [layer for layer in layers if layer.left is not None]
    short = str(dtype).removeprefix("torch.")
    found = []
    formats = {layer.left.format.label for layer in branches if layer.left is not None}
    if narrow := sorted(formats - set(SCALE_NAMES.values())):
        wide = sum(
            2 * x.left.shape[1] * sum(x.weight.shape) for x in branches if x.left is not None
        )
        packed = QuantizedModel(dict(source.layers)).branch_nbytes
        found.append(
            f"The branch of {len(branches)} layers is widened from {'/'.join(narrow)} to {short}, "
            f"from {size_text(packed)} to {size_text(wide)}. Its input and its intermediate are no "
            "longer rounded."
        )
    if branches and any(layer.transform.smooth_I is not None for layer in branches):
        found.append(
            f"R / s, the down-projection, is rounded to {short} (relative error up to "
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
