"""Give ranks and bits to units under one memory budget, by a mixed-integer program.

    min Σ_u s_u·e_u²(option)   over one option a unit, with Σ stored bits ≤ the uniform recipe's

s is each unit's sensitivity and e² the predicted squared error of its output (`prediction`). Where
a larger branch is predicted to do harm (4-bit branch activations can), less than the budget is
spent; everything else fills it. Where nothing is predicted to be better, shares stay uniform.

kind=rank: ranks from 0 (no branch) up to the unit's limit, one format for every main weight.
kind=bits: 4 or 8 bits for weight and activation; one common rank, the best that the memory left
           over pays for, with one step more where that fills the budget.
kind=both: rank and bits of every unit at once.
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
from loraq.quantization.allocation.prediction import predicted_error, spectrum
from loraq.quantization.allocation.solver import Knapsack
from loraq.quantization.budget import branch_bits
from loraq.quantization.grouping import Share, Unit

WIDE = 8
"""Bits of weight and activation of the units that get more of them."""


@dataclass(frozen=True)
class Options:
    """What one unit can get, what each costs in s·e² (K,) and in stored bits (K,)."""

    shares: list[Share]
    cost_K: np.ndarray
    bits_K: np.ndarray

    def only(self, ranks: Sequence[int]) -> Options:
        """Those of the given ranks."""
        kept = [k for k, share in enumerate(self.shares) if share.rank in ranks]
        return Options([self.shares[k] for k in kept], self.cost_K[kept], self.bits_K[kept])


def allocate(
    units: Sequence[Unit],
    weights: Mapping[str, Tensor],
    recipe: Recipe,
    uniform_rank: int,
    sensitivity: Mapping[str, float] | None = None,
) -> dict[str, Share]:
    """Each unit's share by its name; stored bits never above those of the uniform recipe.

    weights: layer name → 16-bit weight of any float type (O, I).
    uniform_rank: the rank that every unit has in the uniform recipe.
    sensitivity: unit name → s_u ≥ 0; None counts relative errors alike.
    Raises LoraqError where there is no branch whose memory could be given out.
    """
    kind, uniform = recipe.allocation.kind, Share(uniform_rank)
    if kind == "uniform":
        return {unit.name: uniform for unit in units}
    if uniform_rank < 1:
        raise LoraqError(
            f"quant.allocation.kind={kind} gives out the memory of the branch, and rank "
            f"{uniform_rank} holds none; the limit is rank 1. Take a method with a branch, give "
            "quant.branch.rank or a higher quant.branch.budget, or quant.allocation.kind=uniform."
        )
    sensitivities = _sensitivities(units, sensitivity)
    budget = sum(share_bits(unit, uniform, recipe) for unit in units)
    options = [
        _options(unit, weights, recipe, uniform_rank, s)
        for unit, s in zip(units, sensitivities, strict=True)
    ]
    problems = [options]
    if kind == "bits":
        ranks = candidate_ranks(uniform_rank, uniform_rank)
        problems = [[each.only(pair) for each in options] for pair in pairwise(ranks)]
    uniform_cost = sum(float(o.cost_K[o.shares.index(uniform)]) for o in options)
    chosen = _best(problems, budget, uniform_cost) or [uniform] * len(units)
    return {unit.name: share for unit, share in zip(units, chosen, strict=True)}


def _sensitivities(units: Sequence[Unit], sensitivity: Mapping[str, float] | None) -> list[float]:
    if sensitivity is None:
        return [1.0] * len(units)
    for unit in units:
        value = sensitivity.get(unit.name)
        if value is None or not 0 <= value < np.inf:
            raise LoraqError(
                f"The sensitivity of '{unit.name}' is {value}; it must be a number from 0 up. "
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
    energy_K = spectrum(unit.stack(weights))
    parts = []
    for weight_bits in (None,) if kind == "rank" else (None, WIDE):
        formats = Share(1, weight_bits).applied(recipe).formats()
        parts.append(
            Options(
                [Share(rank, weight_bits) for rank in ranks],
                sensitivity * predicted_error(energy_K, unit.shape, ranks, formats, recipe),
                np.array([_bits(unit.shape, rank, formats) for rank in ranks]),
            )
        )
    return Options(
        [share for part in parts for share in part.shares],
        np.concatenate([part.cost_K for part in parts]),
        np.concatenate([part.bits_K for part in parts]),
    )


def candidate_ranks(limit: int, uniform_rank: int) -> list[int]:
    """0, …, limit in steps of 1 below 16, 2 below 32, 4 below 64, and so on; the uniform rank too.

    A step is at most an eighth of the rank: σ_r² changes little within it, so finer steps would
    change the predicted error by less than its own accuracy.
    """
    ranks, rank = {limit, min(limit, uniform_rank)}, 0
    while rank < limit:
        ranks.add(rank)
        rank += 1 << max(0, rank.bit_length() - 4)
    return sorted(ranks)


def _best(problems: Sequence[Sequence[Options]], budget: int, least: float) -> list[Share] | None:
    """The shares of the problem whose solution costs least, None where none costs below `least`.

    Problems that by their bounds cannot win stay unsolved.
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
            best = [o.shares[k] for o, k in zip(options, chosen, strict=True)]
    return best


def share_bits(unit: Unit, share: Share, recipe: Recipe) -> int:
    """Stored bits of the unit's main weight and branch, scales included."""
    return _bits(unit.shape, share.rank, share.applied(recipe).formats())


def _bits(shape: tuple[int, int], rank: int, formats: Mapping[str, Format]) -> int:
    main = stored_bits(shape, formats["weight"])
    return main + branch_bits([shape], rank, formats["branch_weight"])
