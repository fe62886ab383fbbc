"""The multiple-choice knapsack: one option a unit, least summed cost under one memory budget.

    min Σ_u c_u(k_u)   with Σ_u b_u(k_u) ≤ budget

A price λ on memory splits it into units: Σ_u min_k (c + λ·b) − λ·budget bounds the least cost from
below (the value of the linear relaxation at its best), and the units' own choices, topped up, bound
it from above. Where the two agree that is the answer; else an option that would lift the lower
bound above the upper one is in no better solution, and the few that remain go to the integer
program (HiGHS), which then takes a fraction of its time on all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loraq.errors import LoraqError

RELATIVE_GAP = 1e-3
"""How far the summed cost may lie above the least one, relative: far less than predictions are
wrong by. Closing the last ten-thousandths can take the program a hundred times as long."""

TIGHTENED = 1e-5
"""Room held back, relative, where the integer program's own tolerance let it be exceeded."""


class Knapsack:
    """One problem with its bounds; `solve` gives the option of each unit by number.

    costs, bits: per unit one value an option (K_u,); costs ≥ 0, bits integers. Deterministic.
    lower, upper: bounds of the least summed cost, `upper` being reached by `found_U`.
    Raises LoraqError where the least options exceed the budget.
    """

    def __init__(
        self, costs: Sequence[np.ndarray], bits: Sequence[np.ndarray], budget: int
    ) -> None:
        least = sum(int(b.min()) for b in bits)
        if least > budget:
            raise LoraqError(
                f"The smallest options of {len(bits)} units store {least} bits, above the budget "
                f"of {budget}. Raise quant.branch.budget or quant.branch.rank, or use "
                "quant.allocation.kind=uniform."
            )
        self.room = budget - least
        self.cost_UK = _table(costs, np.inf)
        self.more_UK = _table([b - b.min() for b in bits], 0)  # bits above the unit's least
        self.cost_UK[self.more_UK > self.room] = np.inf
        self.units_U = np.arange(len(costs))
        price = self._best_price()
        self.found_U = self._topped_up(self._cheapest(price))
        self.upper = self._cost(self.found_U)
        total_UK = self.cost_UK + price * self.more_UK
        self.lower = float(total_UK.min(1).sum() - price * self.room)
        reduced_UK = total_UK - total_UK.min(1, keepdims=True)
        self.kept_UK = self.lower + reduced_UK <= self.upper * (1 + 1e-9)
        self.kept_UK[self.units_U, self.found_U] = True

    def solve(self) -> list[int]:
        """Options within RELATIVE_GAP of the least summed cost; LoraqError if HiGHS gives up."""
        if self.upper - self.lower > RELATIVE_GAP * self.upper:
            for allowed in (1.0, 1.0 - TIGHTENED):
                chosen_U = self._milp(allowed)
                if self._more(chosen_U) <= self.room:
                    chosen_U = self._topped_up(chosen_U)
                    return min(chosen_U, self.found_U, key=self._cost).tolist()
        return self.found_U.tolist()

    def _cheapest(self, price: float) -> np.ndarray:
        """Each unit's option of least cost + price·bits; of equal ones the first."""
        return (self.cost_UK + price * self.more_UK).argmin(1)

    def _more(self, chosen_U: np.ndarray) -> int:
        return int(self.more_UK[self.units_U, chosen_U].sum())

    def _cost(self, chosen_U: np.ndarray) -> float:
        return float(self.cost_UK[self.units_U, chosen_U].sum())

    def _best_price(self) -> float:
        """The least price (to 1e-15 of where the search starts) at which the choices fit."""
        if self._more(self._cheapest(0.0)) <= self.room:
            return 0.0
        finite = np.where(np.isinf(self.cost_UK), 0, self.cost_UK)
        low, high = 0.0, float(finite.sum())  # above the gain of all, for one bit
        for _ in range(100):
            middle = (low + high) / 2
            fits = self._more(self._cheapest(middle)) <= self.room
            low, high = (low, middle) if fits else (middle, high)
        return high

    def _topped_up(self, chosen_U: np.ndarray) -> np.ndarray:
        """The choices, with the room left over spent where it gains most for its bits."""
        chosen_U = chosen_U.copy()
        while True:
            gain_UK = self.cost_UK[self.units_U, chosen_U][:, None] - self.cost_UK
            more_UK = self.more_UK - self.more_UK[self.units_U, chosen_U][:, None]
            useful_UK = (gain_UK > 0) & (more_UK <= self.room - self._more(chosen_U))
            if not useful_UK.any():
                return chosen_U
            rate_UK = np.where(useful_UK, gain_UK / np.maximum(more_UK, 1), -1.0)
            unit, option = np.unravel_index(rate_UK.argmax(), rate_UK.shape)
            chosen_U[unit] = option

    def _milp(self, allowed: float) -> np.ndarray:
        """One binary a kept option, one choice a unit, one budget row, all of magnitude 1."""
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array

        unit_N, option_N = np.nonzero(self.kept_UK)
        number = len(unit_N)
        one_each = csr_array((np.ones(number), (unit_N, np.arange(number))))
        more_N = self.more_UK[unit_N, option_N] / self.room
        result = milp(
            self.cost_UK[unit_N, option_N] * (len(self.units_U) / self.upper),
            integrality=np.ones(number),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(csr_array(more_N[None]), -np.inf, allowed),
            ],
            options={"mip_rel_gap": RELATIVE_GAP},
        )
        if not result.success:
            raise LoraqError(
                f"The allocation was not solved: status {result.status} ({result.message}). Use "
                "quant.allocation.kind=uniform."
            )
        chosen_U = np.zeros(len(self.units_U), dtype=int)
        taken_N = result.x > 0.5
        chosen_U[unit_N[taken_N]] = option_N[taken_N]
        return chosen_U


def _table(rows: Sequence[np.ndarray], fill: float) -> np.ndarray:
    """Rows of unequal length as one array (U, K)."""
    table_UK = np.full((len(rows), max(map(len, rows))), fill, dtype=np.result_type(rows[0], fill))
    for row_K, values_K in zip(table_UK, rows, strict=True):
        row_K[: len(values_K)] = values_K
    return table_UK
