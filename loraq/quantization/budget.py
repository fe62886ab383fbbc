"""The memory budget of a branch: stored bits per weight, and the rank that a budget buys.

    branch bits per weight = (bits(L) + bits(R), scales included) / weights of the quantised set

R is stored once for layers that share it (method.md's q/k/v). One uniform rank over all
units is the largest whose total fits.
"""

from __future__ import annotations

from collections.abc import Sequence

from loraq.config import Recipe
from loraq.errors import LoraqError
from loraq.formats import Format, stored_bits
from loraq.models.layers import Layer
from loraq.quantization.grouping import Unit, make_units


def branch_bits(shapes: Sequence[tuple[int, int]], rank: int, branch: Format) -> int:
    """Stored bits of L (out × rank) and R (rank × in) over units of stacked shape (out, in)."""
    if rank == 0:
        return 0
    return sum(stored_bits((o, rank), branch) + stored_bits((rank, i), branch) for o, i in shapes)


def rank_limit(shapes: Sequence[tuple[int, int]]) -> int:
    """The largest rank every unit can take: the least of all outs and ins."""
    return min(min(shape) for shape in shapes)


def rank_for_budget(
    shapes: Sequence[tuple[int, int]], bits_per_weight: float, branch: Format
) -> int:
    """Largest uniform rank with branch_bits / weights ≤ `bits_per_weight`.

    Raises LoraqError where not even rank 1 fits.
    """
    weights = sum(o * i for o, i in shapes)
    allowed = bits_per_weight * weights
    low, high = 0, rank_limit(shapes)
    while low < high:
        middle = (low + high + 1) // 2
        if branch_bits(shapes, middle, branch) <= allowed:
            low = middle
        else:
            high = middle - 1
    if low == 0:
        least = branch_bits(shapes, 1, branch) / weights
        raise LoraqError(
            f"quant.branch.budget={bits_per_weight} bit/weight buys no rank: rank 1 in "
            f"{branch.label} costs {least:.4f}. Raise the budget, give quant.branch.rank, "
            "or use method=rtn for no branch."
        )
    return low


def check_rank(shapes: Sequence[tuple[int, int]], rank: int) -> int:
    """The rank itself, or a LoraqError naming the limit."""
    limit = rank_limit(shapes)
    if not 1 <= rank <= limit:
        raise LoraqError(
            f"quant.branch.rank={rank} is outside 1..{limit}: the smallest quantised layer has "
            f"{limit} channels on its shorter side. Choose a rank ≤ {limit} or give "
            "quant.branch.budget instead."
        )
    return rank


def choose_rank(units: Sequence[Unit], recipe: Recipe) -> int:
    """The uniform rank: as asked for, or what the budget buys; 0 without a branch."""
    if recipe.branch.kind == "none":
        return 0
    shapes = [unit.shape for unit in units]
    if recipe.branch.rank is not None:
        return check_rank(shapes, recipe.branch.rank)
    assert recipe.branch.budget is not None
    return rank_for_budget(shapes, recipe.branch.budget, recipe.formats()["branch_weight"])


def planned_branch_bits(layers: Sequence[Layer], recipe: Recipe) -> tuple[int, float]:
    """(rank, branch bits per weight) before anything is computed, for plans."""
    units = make_units(layers, recipe.branch.share_qkv)
    rank = choose_rank(units, recipe)
    weights = sum(u.shape[0] * u.shape[1] for u in units)
    bits = branch_bits([u.shape for u in units], rank, recipe.formats()["branch_weight"])
    return rank, bits / weights
