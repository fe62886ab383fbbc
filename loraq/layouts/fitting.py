"""Layers of a file as the layers of a network: without padding, and fused modules as their parts.

Engines fuse layers of one input, as `to_qkv`, whose rows are those of the query, the key and the
value in this order. The parts keep the smoothing and the first factor of the branch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from loraq.errors import LoraqError
from loraq.formats import QuantizedTensor, dequantize
from loraq.layouts.engine_layer import EngineLayer
from loraq.layouts.targets import Contents
from loraq.layouts.tiled_layer import cut
from loraq.layouts.tiles import TILE

FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "add_qkv_proj": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "net.0.proj": ("w3", "w1"),
    "net.2": ("w2",),
}
"""Modules of engines, and the parts of diffusers' networks in the order of their rows."""


def fitted(contents: Contents, network: nn.Module) -> Contents:
    """The contents with the layers that `network` has; what does not fit is left as it is.

    Raises LoraqError for a fused layer whose rows are not those of its parts.
    """
    shapes = {
        name: (module.out_features, module.in_features)
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
    }
    layers: dict[str, EngineLayer] = {}
    for name, layer in contents.layers.items():
        parts = (name,) if name in shapes else _parts(name, shapes)
        whole = parts == (name,) and shapes[name] == tuple(layer.weight.shape)
        own = {} if whole else _split(name, layer, {part: shapes[part] for part in parts})
        layers |= own or {name: layer}
    return replace(contents, layers=layers)


def _parts(name: str, shapes: Mapping[str, tuple[int, int]]) -> tuple[str, ...]:
    """The layers of the network that a fused one stands for; none if they are not all there."""
    for fused, names in FUSED.items():
        if name == fused or name.endswith(f".{fused}"):
            stem = name.removesuffix(fused)
            parts = tuple(f"{stem}{part}" for part in names)
            if all(part in shapes for part in parts):
                return parts
    return ()


def _split(
    name: str, layer: EngineLayer, shapes: Mapping[str, tuple[int, int]]
) -> dict[str, EngineLayer]:
    """The rows of `layer` by part; one part may be padded to tiles. Empty if it has no parts."""
    out, width = layer.weight.shape
    if len(shapes) == 1:
        ((part, (rows, columns)),) = shapes.items()
        fits = 0 <= out - rows < TILE and 0 <= width - columns < TILE
        padded = fits and _is_zero_outside(layer.weight, rows, columns)
        return {part: cut(layer, slice(rows), columns)} if padded else {}
    total = sum(rows for rows, _ in shapes.values())
    if shapes and (out != total or any(columns != width for _, columns in shapes.values())):
        raise LoraqError(
            f"'{name}' is {(out, width)} in the file, and {', '.join(shapes)} are "
            f"{', '.join(map(str, shapes.values()))}: its rows are not theirs. Use the model that "
            "it was made from."
        )
    found, start = {}, 0
    for part, (rows, _) in shapes.items():
        found[part] = cut(layer, slice(start, start + rows), width)
        start += rows
    return found


def _is_zero_outside(weight: QuantizedTensor | Tensor, rows: int, columns: int) -> bool:
    """Whether all but the first rows and columns are padding."""
    weight_OI = dequantize(weight) if isinstance(weight, QuantizedTensor) else weight
    return not (weight_OI[rows:].any() or weight_OI[:, columns:].any())


def joined_rows(layers: Sequence[EngineLayer]) -> EngineLayer:
    """Layers of one smoothing and one first factor as one layer, the inverse of splitting rows.

    Tensor scales that differ become scales of rows; a missing bias is zero if another is not.
    """
    first, weights = layers[0], [layer.weight for layer in layers]
    if len(layers) == 1:
        return first
    packed = [weight for weight in weights if isinstance(weight, QuantizedTensor)]
    scales = [weight.tensor_scale for weight in packed]
    tensor_scale, fmt = scales[0], packed[0].format
    if tensor_scale is not None:
        each = [
            scale.expand(weight.shape[0], 1) if scale.dim() == 0 else scale
            for scale, weight in zip(scales, packed, strict=True)
            if scale is not None
        ]
        tensor_scale, fmt = torch.cat(each), replace(fmt, tensor_scale="token")
    weight = QuantizedTensor(
        torch.cat([weight.codes for weight in packed]),
        torch.cat([weight.scale for weight in packed if weight.scale is not None]),
        tensor_scale,
        (sum(weight.shape[0] for weight in packed), packed[0].shape[1]),
        fmt,
    )
    biases = [
        torch.zeros(layer.weight.shape[0], dtype=first.dtype)
        if layer.bias_O is None
        else layer.bias_O
        for layer in layers
    ]
    return replace(
        first,
        weight=weight,
        up_OR=torch.cat([layer.up_OR for layer in layers if layer.up_OR is not None]),
        bias_O=None if all(layer.bias_O is None for layer in layers) else torch.cat(biases),
    )
