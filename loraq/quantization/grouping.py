"""Units and groups. A unit is a layer, or the stacked layers that read one input and share R.

q/k/v of a self-attention read the same x; stacked along `out` they share R, as in SVDQuant.
Units of equal roles, shape, kind of input (behind a GELU or not) and number of captured rows form a
group: one batch of matrices, stored in one file.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loraq.config import AllocationConfig, BranchConfig, Recipe
from loraq.models.layers import Layer
from loraq.utils.gpu import memory_at_least

INTEGER = re.compile(r"^((?:mx)?int)\d+$")
"""Names of the formats whose bits an allocation can change."""
MAX_GROUP_ELEMENTS = 5 << 20
"""Maximum weights per group, so that an alternation's iterates stay in the processor's cache."""
GPU_GROUP_ELEMENTS = 32 << 20
"""Maximum weights per group on a GPU: on few units, its kernels are shorter than their launches."""
GPU_BYTES = 256
"""Most bytes that solving takes per weight: float64 iterates, moments, calibration rows."""


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
    def after_gelu(self) -> bool:
        return self.layers[0].after_gelu

    @property
    def shape(self) -> tuple[int, int]:
        return sum(layer.shape[0] for layer in self.layers), self.layers[0].shape[1]

    def stack(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Weights of the layers stacked along `out`, float32 (ΣO, I)."""
        return torch.cat([weights[layer.name].float() for layer in self.layers])


@dataclass(frozen=True)
class UnitAllocation:
    """One unit's branch rank (0: no branch) and bits of its main weight (None: the recipe's)."""

    rank: int
    weight_bits: int | None = None

    def apply_to(self, recipe: Recipe) -> Recipe:
        """`recipe` for this unit: without a branch if the rank is 0, formats with these bits."""
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
    """Units of equal roles, shape, inputs and allocation, quantised as one batch."""

    name: str
    units: tuple[Unit, ...]
    allocation: UnitAllocation

    def __repr__(self) -> str:
        return f"Group({self.name}: {len(self.units)} units, {self.weights} weights)"

    @property
    def file(self) -> str:
        return f"{self.name}.safetensors"

    @property
    def weights(self) -> int:
        return sum(unit.weights for unit in self.units)


def make_units(layers: Sequence[Layer], share_qkv: bool) -> list[Unit]:
    """One unit per layer; with share_qkv, one per set of layers that read the same input."""
    if not share_qkv:
        return [Unit((layer,)) for layer in layers]
    by_input: dict[str, list[Layer]] = {}
    for layer in layers:
        by_input.setdefault(layer.shares_input, []).append(layer)
    return [Unit(tuple(members)) for members in by_input.values()]


def group_elements(device: torch.device) -> int:
    """Maximum weights per group on `device`; on a GPU, groups take at most a quarter of its memory.

    The card's memory decides, as in keys (`memory_at_least`), not what is free: the size of a batch
    changes the last bits of iterated methods.
    """
    if device.type != "cuda":
        return MAX_GROUP_ELEMENTS
    fitting = memory_at_least(device) // (4 * GPU_BYTES)
    return max(MAX_GROUP_ELEMENTS, min(fitting, GPU_GROUP_ELEMENTS))


def make_groups(
    units: Sequence[Unit],
    allocations: Mapping[str, UnitAllocation],
    elements: int,
    rows: Mapping[str, Tensor] | None = None,
) -> list[Group]:
    """Batches of equal units with at most `elements` weights each (but at least one unit).

    Groups follow model order, so that layer kinds alternate and the progress bar's estimate is
    representative from the start. rows: captured inputs by input id, if units are to have equally
    many: two experts run in different numbers of steps.
    """
    by_kind: dict[tuple[tuple[str, ...], tuple[int, int], UnitAllocation, bool, int], list[Unit]]
    by_kind = {}
    for unit in units:
        count = 0 if rows is None else len(rows[unit.input_id])
        kind = (unit.roles, unit.shape, allocations[unit.name], unit.after_gelu, count)
        by_kind.setdefault(kind, []).append(unit)
    uniform = len(set(allocations.values())) == 1
    groups: list[Group] = []
    numbers: Counter[str] = Counter()
    for (roles, (o, i), given, *_), members in by_kind.items():
        size = max(1, elements // (o * i))
        suffix = "" if uniform else f".r{given.rank}" + f"b{given.weight_bits or ''}".rstrip("b")
        shared = f"{'+'.join(roles)}.{o}x{i}{suffix}"
        for start in range(0, len(members), size):
            name = f"{shared}.{numbers[shared]:03d}"
            numbers[shared] += 1
            groups.append(Group(name, tuple(members[start : start + size]), given))
    position = {unit.name: number for number, unit in enumerate(units)}
    return sorted(groups, key=lambda group: position[group.units[0].name])
