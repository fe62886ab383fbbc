"""Inputs of one forward of a transformer, to trace which layers it calls or to count its work."""

from __future__ import annotations

from typing import Any

from torch import nn

from loraq.models.discovery.arguments import TOKENS, InputShape, arguments
from loraq.models.discovery.structure import structure_of
from loraq.models.layers import family_of, find_family


def example_inputs(
    transformer: nn.Module,
    images: int = 1,
    side: int | None = None,
    tokens: int = TOKENS,
    family: str | None = None,
) -> dict[str, Any]:
    """Keyword arguments of `transformer.forward`, by default the smallest: 2×2 patches, two tokens.

    side: of the square latents. family: None: that of the transformer's class. All values are 1.
    """
    found = find_family(family_of(transformer, family))
    if found.example_inputs is not None:
        sizes = {"images": images, "tokens": tokens} | ({} if side is None else {"side": side})
        return dict(found.example_inputs(transformer, **sizes))
    shape = InputShape(images, side, tokens)
    return arguments(transformer, shape, structure_of(transformer, found).layout)
