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
    dtype, found = source.dtype, [*branch_loss(source), *factor_loss(source)]
    scales = (layer.weight.scale for layer in source.layers.values())
    if {scale.dtype for scale in scales if scale is not None} & set(SCALE_NAMES) - {dtype}:
        found.append(
            f"Block scales of the weights are rounded to {short(dtype)} (relative error up to "
            f"{_EPSILON[dtype]}); quant.weight.scale={SCALE_NAMES[dtype]} avoids it."
        )
    return [*found, sixteen_bits(source)]


def sixteen_bits(source: Source) -> str:
    """What is in the file's 16-bit type in every layout."""
    return f"Biases, and inputs and outputs of these layers, are in {short(source.dtype)}."


def factor_loss(source: Source) -> list[str]:
    """Factors of the branch that the file's 16-bit type does not hold exactly."""
    layers, dtype = source.layers.values(), source.dtype
    factors = [(x.left.format, x.transform) for x in layers if x.left is not None]
    if all(t.smooth_I is None and f.name == SCALE_NAMES[dtype] for f, t in factors):
        return []
    return [
        f"R / s and L, the factors of the branch, are rounded to {short(dtype)} (relative error up "
        f"to {_EPSILON[dtype]})."
    ]


def activation_loss(source: Source, read: Callable[[LayerTensors], Format]) -> list[str]:
    """How many layers' inputs are rounded otherwise than here. read: what a layer's reader does."""
    layers = source.layers.values()
    pairs = [(x.activation.label, read(x).label) for x in layers if x.activation != read(x)]
    if not pairs:
        return []
    own, theirs = ("/".join(sorted(set(labels))) for labels in zip(*pairs, strict=True))
    return [f"The inputs of {len(pairs)} layers are rounded to {theirs}, not to {own}."]


def branch_loss(source: Source) -> list[str]:
    """How much larger a branch of 8 or 4 bits becomes, and what is no longer rounded in it."""
    layers, found = source.layers.values(), []
    branches = [(x.left, sum(x.weight.shape)) for x in layers if x.left is not None]
    narrow = {left.format.label for left, _ in branches if left.format.family != "float"}
    if narrow:
        wide = sum(2 * left.shape[1] * sizes for left, sizes in branches)
        packed = QuantizedModel(dict(source.layers)).branch_nbytes
        found.append(
            f"The branch of {len(branches)} layers is widened from {'/'.join(sorted(narrow))} to "
            f"{short(source.dtype)}, from {size_text(packed)} to {size_text(wide)}."
        )
    rounded = (x.branch_activation for x in layers if x.left is not None)
    if any(fmt is not None and fmt.family != "float" for fmt in rounded):
        found.append("The branch's input and its intermediate are no longer rounded.")
    return found


def short(dtype: torch.dtype) -> str:
    """Without `torch.`."""
    return str(dtype).removeprefix("torch.")
