"""Products of one forward at any size, from forwards without weights at small sizes.

Rows of a layer, and queries and keys of an attention, grow linearly with the latents' positions and
with the prompt's tokens: three forwards give the slopes, a fourth must agree exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from loraq.models.discovery.arguments import TOKENS, InputShape
from loraq.models.discovery.traced import Trace, trace
from loraq.models.family import Family

_PADDED = 16
"""Times the smallest size, for models that pad images and prompts to 32 tokens, as Z-Image does."""


@dataclass(frozen=True)
class Products:
    """Multiply-adds of every layer, by name, and of the products of all attentions."""

    layers: dict[str, int]
    attention: int

    @property
    def total(self) -> int:
        """All multiply-adds."""
        return sum(self.layers.values()) + self.attention


def count_products(
    transformer: nn.Module, family: Family, positions: int, tokens: int
) -> Products | None:
    """The products of one image's forward; None if the forward cannot be traced or does not fit.

    positions: of the latents, over all frames. tokens: of the prompt.
    """
    kind, config = type(transformer), dict(getattr(transformer, "config", {}))
    if not hasattr(kind, "from_config"):
        return None
    first = trace(kind, config, family)[1]
    for times in (1, _PADDED):
        side, count = times * first.side, times * TOKENS
        places = [(side, count), (2 * side, count), (side, 2 * count), (3 * side, 3 * count)]
        traces = [
            first if place == (first.side, TOKENS) else _at(kind, config, family, place, first)
            for place in places
        ]
        if any(one.failure or one.calls.keys() != first.calls.keys() for one in traces):
            return None
        *known, last = traces
        if _grown(known, places, *places[-1]) == _counted(last):
            return _grown(known, places, side=positions**0.5, tokens=tokens)
    return None


def _at(kind: type, config: dict[str, Any], family: Family, place: Any, first: Trace) -> Trace:
    shape = InputShape(side=place[0], tokens=place[1])
    return trace(kind, config, family, shape, [first.layout])[1]


def _counted(one: Trace) -> Products:
    layers = {name: sum(call.products for call in calls) for name, calls in one.calls.items()}
    return Products(layers, sum(math.prod(product) for product in one.attention))


def _grown(
    known: Sequence[Trace], places: Sequence[tuple[int, int]], side: float, tokens: int
) -> Products:
    """The products with latents of `side` and `tokens`, from those at the first three places."""
    (base, count), (wider, _), (_, longer) = places[:3]
    wide = (side**2 - base**2) / (wider**2 - base**2)
    long = (tokens - count) / (longer - count)

    def grown(values: Sequence[int]) -> float:
        return values[0] + (values[1] - values[0]) * wide + (values[2] - values[0]) * long

    counted = [_counted(one).layers for one in known]
    layers = {name: round(grown([one[name] for one in counted])) for name in counted[0]}
    attention = 0.0
    for calls in zip(*(one.attention for one in known), strict=True):
        channels, queries, keys = zip(*calls, strict=True)
        attention += grown(channels) * grown(queries) * grown(keys)
    return Products(layers, round(attention))
