"""Allocate ranks and bits to units within one memory budget, by a mixed-integer program.

    min Σ_u s_u·e_u²(option)   one option per unit, subject to Σ stored bits ≤ the uniform recipe's

s is each unit's sensitivity and e² the predicted squared error of its output (`prediction`). If a
larger branch is predicted to increase the error (possible with 4-bit branch activations), part of
the budget stays unused. If no option is predicted to be better, the allocation stays uniform.

kind=rank: ranks from 0 (no branch) to the unit's limit, one format for every main weight.
kind=bits: 4 or 8 bits for weight and activation; one common rank, the best that the remaining
           memory allows, one step higher for some units if that fills the budget.
kind=both: rank and bits of every unit jointly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from torch import Tensor

from loraq.config import Recipe
from loraq.errors import LoraqError
from loraq.formats import Format, stored_bits
from loraq.quantization.allocation.prediction import energy_spectrum, predicted_error
from loraq.quantization.allocation.solver import Knapsack
from loraq.quantization.budget import branch_bits
from loraq.quantization.grouping import Unit, UnitAllocation

WIDE = 8
"""Bits of weight and activation in units with the wider format."""


@dataclass(frozen=True)
class Options:
    """The K options of one unit: allocations, costs s·e² (K,) and stored bits (K,)."""

    allocations: list[UnitAllocation]
    cost_K: np.ndarray
    bits_K: np.ndarray

    def __repr__(self) -> str:
        return f"Options({len(self.allocations)}, {self.bits_K.min()}..{self.bits_K.max()} bits)"

    def with_ranks(self, ranks: Sequence[int]) -> Options:
        """The options with one of these ranks."""
        kept = [k for k, option in enumerate(self.allocations) if option.rank in ranks]
        return Options([self.allocations[k] for k in kept], self.cost_K[kept], self.bits_K[kept])


def allocate_units(
    units: Sequence[Unit],
    weights: Mapping[str, Tensor],
    recipe: Recipe,
    uniform_rank: int,
    sensitivity: Mapping[str, float] | None = None,
) -> dict[str, UnitAllocation]:
    """Unit name → allocation; total stored bits are at most those of the uniform recipe.

    weights: layer name → 16-bit weight of any float type (O, I).
    uniform_rank: the rank of every unit in the uniform recipe.
    sensitivity: unit name → s_u ≥ 0; None weights all relative errors equally.

    Raises LoraqError if the uniform recipe has no branch, or for a sensitivity that is missing or
    negative.
    """
    kind, uniform = recipe.allocation.kind, UnitAllocation(uniform_rank)
    if kind == "uniform":
        return {unit.name: uniform for unit in units}
    if uniform_rank < 1:
        raise LoraqError(
            f"quant.allocation.kind={kind} distributes the memory of the branch, and rank "
            f"{uniform_rank} has none; the minimum is rank 1. Use a method with a branch, set "
            "quant.branch.rank or a higher quant.branch.budget, or quant.allocation.kind=uniform."
        )
    sensitivities = _sensitivities(units, sensitivity)
    budget = sum(unit_bits(unit, uniform, recipe) for unit in units)
    options = [
        _options(unit, weights, recipe, uniform_rank, s)
        for unit, s in zip(units, sensitivities, strict=True)
    ]
    problems = [options]
    if kind == "bits":
        ranks = candidate_ranks(uniform_rank, uniform_rank)
        problems = [[each.with_ranks(pair) for each in options] for pair in pairwise(ranks)]
    uniform_cost = sum(float(o.cost_K[o.allocations.index(uniform)]) for o in options)
    chosen = _best(problems, budget, uniform_cost) or [uniform] * len(units)
    return {unit.name: option for unit, option in zip(units, chosen, strict=True)}


def _sensitivities(units: Sequence[Unit], sensitivity: Mapping[str, float] | None) -> list[float]:
    if sensitivity is None:
        return [1.0] * len(units)
    for unit in units:
        value = sensitivity.get(unit.name)
        if value is None or not 0 <= value < np.inf:
            raise LoraqError(
                f"The sensitivity of '{unit.name}' is {value}; it must be a finite number ≥ 0. "
                "Measure every unit again, or use quant.allocation.sensitivity=weights."
            )
    return [float(sensitivity[unit.name]) for unit in units]


def _options(
    unit: Unit,
    weights: Mapping[str, Tensor],
    recipe: Recipe,
    uniform_rank: int,
    sensitivity: float,
) -> Options:
    kind = recipe.allocation.kind
    ranks = candidate_ranks(uniform_rank if kind == "bits" else min(unit.shape), uniform_rank)
    energy_K = energy_spectrum(unit.stack(weights))
    parts = []
    for weight_bits in (None,) if kind == "rank" else (None, WIDE):
        formats = UnitAllocation(1, weight_bits).apply_to(recipe).formats()
        parts.append(
            Options(
                [UnitAllocation(rank, weight_bits) for rank in ranks],
                sensitivity * predicted_error(energy_K, unit.shape, ranks, formats, recipe),
                np.array([_bits(unit.shape, rank, formats) for rank in ranks]),
            )
        )
    return Options(
        [option for part in parts for option in part.allocations],
        np.concatenate([part.cost_K for part in parts]),
        np.concatenate([part.bits_K for part in parts]),
    )


def candidate_ranks(limit: int, uniform_rank: int) -> list[int]:
    """0, …, limit in steps of 1 below 16, 2 below 32, 4 below 64, and so on; and the uniform rank.

    A step is at most an eighth of the rank: σ_r² changes little within it, so finer steps would
    change the predicted error by less than its accuracy.
    """
    ranks, rank = {limit, min(limit, uniform_rank)}, 0
    while rank < limit:
        ranks.add(rank)
        rank += 1 << max(0, rank.bit_length() - 4)
    return sorted(ranks)


def _best(
    problems: Sequence[Sequence[Options]], budget: int, least: float
) -> list[UnitAllocation] | None:
    """The allocations of the problem with the lowest cost; None if none is below `least`.

    Skips problems whose lower bound is not below the best cost so far.
    """
    packed = [Knapsack([o.cost_K for o in p], [o.bits_K for o in p], budget) for p in problems]
    best = None
    for number in np.argsort([knapsack.lower for knapsack in packed], kind="stable"):
        options = problems[number]
        if packed[number].lower >= least:
            break
        chosen = packed[number].solve()
        cost = sum(float(o.cost_K[k]) for o, k in zip(options, chosen, strict=True))
        if cost < least:
            least = cost
            best = [o.allocations[k] for o, k in zip(options, chosen, strict=True)]
    return best


def unit_bits(unit: Unit, allocation: UnitAllocation, recipe: Recipe) -> int:
    """Stored bits of the unit's main weight and branch, scales included."""
    return _bits(unit.shape, allocation.rank, allocation.apply_to(recipe).formats())


def _bits(shape: tuple[int, int], rank: int, formats: Mapping[str, Format]) -> int:
    main = stored_bits(shape, formats["weight"])
    return main + branch_bits([shape], rank, formats["branch_weight"])
