"""Units: what a branch is found for. A layer, or the stacked layers that read one input.

q/k/v of a self-attention read the same x; stacked along `out` they share R, as in SVDQuant.
Units of equal roles and shape form a group: one batch of matrices, one file, one step of resume.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraq.models import Layer

MAX_GROUP_ELEMENTS = 1 << 26
"""Weights in one group at most (256 MiB in float32): bounds memory at full size."""


@dataclass(frozen=True)
class Unit:
    """Layers stacked along `out`; `shape` is (sum of outs, in)."""

    layers: tuple[Layer, ...]

    @property
    def name(self) -> str:
        return self.layers[0].name

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(layer.role for layer in self.layers)

    @property
    def input_id(self) -> str:
        return self.layers[0].shares_input

    @property
    def shape(self) -> tuple[int, int]:
        return sum(layer.shape[0] for layer in self.layers), self.layers[0].shape[1]

    def stack(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Weights of the layers stacked along `out`, float32 (ΣO, I)."""
        return torch.cat([weights[layer.name].float() for layer in self.layers])


@dataclass(frozen=True)
class Group:
    """Units of equal roles and shape, quantised as one batch."""

    name: str
    units: tuple[Unit, ...]


def make_units(layers: Sequence[Layer], share_qkv: bool) -> list[Unit]:
    """One unit a layer, or one for each set of layers that read the same input."""
    if not share_qkv:
        return [Unit((layer,)) for layer in layers]
    by_input: dict[str, list[Layer]] = {}
    for layer in layers:
        by_input.setdefault(layer.shares_input, []).append(layer)
    return [Unit(tuple(members)) for members in by_input.values()]


def make_groups(units: Sequence[Unit]) -> list[Group]:
    """Batches of equal units in model order, each of at most MAX_GROUP_ELEMENTS weights."""
    alike: dict[tuple, list[Unit]] = {}
    for unit in units:
        alike.setdefault((unit.roles, unit.shape), []).append(unit)
    groups = []
    for (roles, (o, i)), members in alike.items():
        size = max(1, MAX_GROUP_ELEMENTS // (o * i))
        for start in range(0, len(members), size):
            name = f"{'+'.join(roles)}.{o}x{i}.{start // size:03d}"
            groups.append(Group(name, tuple(members[start : start + size])))
    return groups
