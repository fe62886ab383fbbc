"""The memory budget of a branch: stored bits per weight, and the rank that fits a budget.

    branch bits per weight = (bits(L) + bits(R), scales included) / weights of the quantised layers

R is stored once for layers that share it (q/k/v in method.md). The uniform rank is the largest
whose total over all units fits.
"""

from __future__ import annotations

from collections.abc import Sequence

from loraq.config import Recipe
from loraq.errors import LoraqError
from loraq.formats import Format, get_format, stored_bits
from loraq.models.layers import Layer
from loraq.quantization.grouping import Unit, make_units


def branch_bits(shapes: Sequence[tuple[int, int]], rank: int, branch: Format) -> int:
    """Stored bits of L (out × rank) and R (rank × in) over units of stacked shape (out, in)."""
    if rank == 0:
        return 0
    return sum(stored_bits((o, rank), branch) + stored_bits((rank, i), branch) for o, i in shapes)


def rank_limit(shapes: Sequence[tuple[int, int]]) -> int:
    """The largest rank that every unit can have: the smallest of all `out` and `in`."""
    return min(min(shape) for shape in shapes)


def rank_for_budget(
    shapes: Sequence[tuple[int, int]], bits_per_weight: float, branch: Format
) -> int:
    """The largest uniform rank with branch_bits / weights ≤ `bits_per_weight`.

    Raises LoraqError if rank 1 does not fit.
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
            f"quant.branch.budget={bits_per_weight} bit/weight is too small for rank 1, which "
            f"takes {least:.4f} in {branch.label}. Raise the budget, set quant.branch.rank, "
            "or use method=rtn for no branch."
        )
    return low


def check_rank(shapes: Sequence[tuple[int, int]], rank: int, name: str = "rank") -> int:
    """`rank` unchanged; LoraqError if it is above the limit."""
    limit = rank_limit(shapes)
    if not 1 <= rank <= limit:
        raise LoraqError(
            f"quant.branch.{name}={rank} is outside 1..{limit}: the smallest quantised layer has "
            f"{limit} channels on its shorter side. Choose a rank ≤ {limit} or set "
            "quant.branch.budget instead."
        )
    return rank


def choose_rank(units: Sequence[Unit], recipe: Recipe) -> int:
    """The uniform rank: `branch.rank`, or the largest within the budget; 0 without a branch."""
    branch = recipe.branch
    if branch.kind == "none":
        return 0
    shapes = [unit.shape for unit in units]
    if branch.rank is not None:
        return check_rank(shapes, branch.rank)
    budget = branch.budget
    if branch.budget_rank is not None:
        bits = branch_bits(
            shapes, check_rank(shapes, branch.budget_rank, "budget_rank"), get_format("fp16")
        )
        budget = bits / sum(o * i for o, i in shapes)
    assert budget is not None
    return rank_for_budget(shapes, budget, recipe.formats()["branch_weight"])


def planned_branch_bits(layers: Sequence[Layer], recipe: Recipe) -> tuple[int, float]:
    """(rank, branch bits per weight) of a recipe, without quantising anything."""
    units = make_units(layers, recipe.branch.share_qkv)
    rank = choose_rank(units, recipe)
    weights = sum(u.shape[0] * u.shape[1] for u in units)
    bits = branch_bits([u.shape for u in units], rank, recipe.formats()["branch_weight"])
    return rank, bits / weights
