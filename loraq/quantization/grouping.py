"""Units: what a branch is found for. A layer, or the stacked layers that read one input.

q/k/v of a self-attention read the same x; stacked along `out` they share R, as in SVDQuant.
Units of equal roles and shape form a group: one batch of matrices, one file, one step of resume.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loraq.config import AllocationConfig, BranchConfig, Recipe
from loraq.models.layers import Layer

INTEGER = re.compile(r"^((?:mx)?int)\d+$")
"""Formats of a family that differ in their bits alone; others stay as the recipe says."""
MAX_GROUP_ELEMENTS = 5 << 20
"""Weights in one group at most: the rounds of an alternation then stay in a processor's cache."""


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
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]

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
class Share:
    """What one unit gets of the memory: its branch's rank (0: none) and its main weight's bits."""

    rank: int
    weight_bits: int | None = None

    def applied(self, recipe: Recipe) -> Recipe:
        """`recipe` for this unit: no branch where the rank is 0, in formats of these bits."""
        recipe = replace(recipe, allocation=AllocationConfig())
        if not self.rank:
            recipe = replace(recipe, branch=BranchConfig())
        if self.weight_bits is None:
            return recipe
        names = {
            operand: re.sub(INTEGER, rf"\g<1>{self.weight_bits}", getattr(recipe, operand).name)
            for operand in ("weight", "activation")
        }
        formats = {o: replace(getattr(recipe, o), name=name) for o, name in names.items()}
        transform = recipe.transform
        if transform.shift and names["activation"] != "int4":
            transform = replace(transform, shift=False)
        return replace(recipe, transform=transform, **formats)


@dataclass(frozen=True)
class Group:
    """Units of equal roles, shape and share, quantised as one batch."""

    name: str
    units: tuple[Unit, ...]
    share: Share

    @property
    def file(self) -> str:
        return f"{self.name}.safetensors"

    @property
    def weights(self) -> int:
        return sum(unit.weights for unit in self.units)


def make_units(layers: Sequence[Layer], share_qkv: bool) -> list[Unit]:
    """One unit a layer, or one for each set of layers that read the same input."""
    if not share_qkv:
        return [Unit((layer,)) for layer in layers]
    by_input: dict[str, list[Layer]] = {}
    for layer in layers:
        by_input.setdefault(layer.shares_input, []).append(layer)
    return [Unit(tuple(members)) for members in by_input.values()]


def make_groups(units: Sequence[Unit], shares: Mapping[str, Share]) -> list[Group]:
    """Batches of equal units, each of at most MAX_GROUP_ELEMENTS weights; in model order.

    So large models go through kind after kind of layer, again and again: the pace of the first
    tenth is that of the rest.
    """
    alike: dict[tuple, list[Unit]] = {}
    for unit in units:
        alike.setdefault((unit.roles, unit.shape, shares[unit.name]), []).append(unit)
    uniform = len(set(shares.values())) == 1
    groups = []
    for (roles, (o, i), share), members in alike.items():
        size = max(1, MAX_GROUP_ELEMENTS // (o * i))
        given = "" if uniform else f".r{share.rank}" + f"b{share.weight_bits or ''}".rstrip("b")
        for start in range(0, len(members), size):
            name = f"{'+'.join(roles)}.{o}x{i}{given}.{start // size:03d}"
            groups.append(Group(name, tuple(members[start : start + size]), share))
    place = {unit.name: number for number, unit in enumerate(units)}
    return sorted(groups, key=lambda group: place[group.units[0].name])
