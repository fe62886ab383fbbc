"""Why layouts cannot hold a layer, with the remedy: one wording of the reasons that they share."""

from __future__ import annotations

from dataclasses import replace

from loraq.errors import LoraqError
from loraq.layers.tensors import LayerTensors
from loraq.layouts.engine_layer import engine_layer
from loraq.layouts.targets import Source


def refuse_convolution(source: Source, name: str) -> str | None:
    """A 1×1 convolution."""
    if not source.convolution(name):
        return None
    return "it is a 1×1 convolution, and the layout has nn.Linear alone. Add it to quant.skip"


def refuse_rotation(layer: LayerTensors) -> str | None:
    """A rotated input."""
    if layer.transform.signs_I is None:
        return None
    return (
        "its input is rotated, which the reader does not do. Quantise with method=loraq_export, or "
        "quant.transform.hadamard=0"
    )


def refuse_shift(layer: LayerTensors) -> str | None:
    """A shifted input."""
    if not layer.transform.shift:
        return None
    return (
        f"its input is shifted by {layer.transform.shift}, which the reader does not do. Quantise "
        "with method=loraq_export, or quant.transform.shift=false"
    )


def refuse_smoothing(layer: LayerTensors) -> str | None:
    """A smoothed input."""
    if layer.transform.smooth_I is None:
        return None
    return "its input is smoothed, which the reader does not do. Set quant.transform.smooth=none"


def refuse_format(layer: LayerTensors, fits: bool, *overrides: str) -> str | None:
    """A weight in another format than these overrides choose."""
    if fits:
        return None
    return f"its weight is {layer.weight.format.label}. Quantise with {' or '.join(overrides)}"


def refuse_width(layer: LayerTensors, multiple: int) -> str | None:
    """A number of inputs that is no multiple."""
    if not (width := layer.weight.shape[1]) % multiple:
        return None
    return f"its {width} inputs are no multiple of {multiple}. Add it to quant.skip"


def refuse_range(source: Source, name: str) -> str | None:
    """Numbers that the 16-bit type of the file cannot hold."""
    layer = source.layers[name]
    unrotated = replace(layer, transform=replace(layer.transform, signs_I=None))
    try:
        engine_layer(unrotated, layer.activation, source.dtype)
    except LoraqError as error:
        return str(error)
    return None
