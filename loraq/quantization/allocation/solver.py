"""The multiple-choice knapsack problem: one option per unit, minimum total cost within a budget.

    min Σ_u c_u(k_u)   subject to Σ_u b_u(k_u) ≤ budget

A Lagrange multiplier λ on memory separates the units: Σ_u min_k (c + λ·b) − λ·budget is a lower
bound on the cost (at the best λ, the value of the linear relaxation). The units' minimisers,
improved greedily, give an upper bound. If the two bounds agree, they are the solution. Otherwise,
options whose reduced cost lifts the lower bound above the upper one are excluded, and HiGHS solves
the integer program of the few others, in a fraction of the time for all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loraq.errors import LoraqError

RELATIVE_GAP = 1e-3
"""Relative optimality gap: far below the error of the predictions. A gap of 1e-4 can take HiGHS a
hundred times as long."""

TIGHTENED = 1e-5
"""Relative reduction of the budget if HiGHS' feasibility tolerance let a solution exceed it."""


class Knapsack:
    """One problem with its bounds; `solve` returns the index of each unit's option.

    costs, bits: per unit one value per option (K_u,); costs ≥ 0, bits integers. Deterministic.
    lower, upper: bounds on the minimum cost; `feasible_U` has the cost `upper`.

    Raises LoraqError if the smallest options exceed the budget.
    """

    def __init__(
        self, costs: Sequence[np.ndarray], bits: Sequence[np.ndarray], budget: int
    ) -> None:
        least = sum(int(b.min()) for b in bits)
        if least > budget:
            raise LoraqError(
                f"The smallest options of {len(bits)} units take {least} bits, above the budget "
                f"of {budget}. Raise quant.branch.budget or quant.branch.rank, or use "
                "quant.allocation.kind=uniform."
            )
        self.slack = budget - least
        self.cost_UK = _padded(costs, np.inf)
        self.extra_UK = _padded([b - b.min() for b in bits], 0)  # bits above the unit's minimum
        self.cost_UK[self.extra_UK > self.slack] = np.inf
        self.units_U = np.arange(len(costs))
        multiplier = self._best_multiplier()
        self.feasible_U = self._improved_greedily(self._minimizers(multiplier))
        self.upper = self._cost(self.feasible_U)
        lagrangian_UK = self.cost_UK + multiplier * self.extra_UK
        self.lower = float(lagrangian_UK.min(1).sum() - multiplier * self.slack)
        reduced_UK = lagrangian_UK - lagrangian_UK.min(1, keepdims=True)
        self.kept_UK = self.lower + reduced_UK <= self.upper * (1 + 1e-9)
        self.kept_UK[self.units_U, self.feasible_U] = True

    def __repr__(self) -> str:
        units, options = self.cost_UK.shape
        return f"Knapsack({units} units, ≤ {options} options, cost {self.lower:g}..{self.upper:g})"

    def solve(self) -> list[int]:
        """Options with a cost within RELATIVE_GAP of the minimum; LoraqError if HiGHS fails."""
        if self.upper - self.lower > RELATIVE_GAP * self.upper:
            for allowed in (1.0, 1.0 - TIGHTENED):
                chosen_U = self._milp(allowed)
                if self._extra_bits(chosen_U) <= self.slack:
                    chosen_U = self._improved_greedily(chosen_U)
                    return min(chosen_U, self.feasible_U, key=self._cost).tolist()
        return self.feasible_U.tolist()

    def _minimizers(self, multiplier: float) -> np.ndarray:
        """Each unit's option with the smallest cost + multiplier·bits, the first of equal ones."""
        return (self.cost_UK + multiplier * self.extra_UK).argmin(1)

    def _extra_bits(self, chosen_U: np.ndarray) -> int:
        return int(self.extra_UK[self.units_U, chosen_U].sum())

    def _cost(self, chosen_U: np.ndarray) -> float:
        return float(self.cost_UK[self.units_U, chosen_U].sum())

    def _best_multiplier(self) -> float:
        """The smallest multiplier whose minimisers fit, to 1e-15 of the initial upper bound."""
        if self._extra_bits(self._minimizers(0.0)) <= self.slack:
            return 0.0
        finite = np.where(np.isinf(self.cost_UK), 0, self.cost_UK)
        low, high = 0.0, float(finite.sum())  # one bit costs more than all gains together
        for _ in range(100):
            middle = (low + high) / 2
            fits = self._extra_bits(self._minimizers(middle)) <= self.slack
            low, high = (low, middle) if fits else (middle, high)
        return high

    def _improved_greedily(self, chosen_U: np.ndarray) -> np.ndarray:
        """The choices after spending the unused budget on the largest gain per bit, repeatedly."""
        chosen_U = chosen_U.copy()
        while True:
            gain_UK = self.cost_UK[self.units_U, chosen_U][:, None] - self.cost_UK
            more_UK = self.extra_UK - self.extra_UK[self.units_U, chosen_U][:, None]
            useful_UK = (gain_UK > 0) & (more_UK <= self.slack - self._extra_bits(chosen_U))
            if not useful_UK.any():
                return chosen_U
            rate_UK = np.where(useful_UK, gain_UK / np.maximum(more_UK, 1), -1.0)
            unit, option = np.unravel_index(rate_UK.argmax(), rate_UK.shape)
            chosen_U[unit] = option

    def _milp(self, allowed: float) -> np.ndarray:
        """Solve with HiGHS: a binary variable per kept option, rows scaled to magnitude 1."""
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array

        unit_N, option_N = np.nonzero(self.kept_UK)
        number = len(unit_N)
        one_each = csr_array((np.ones(number), (unit_N, np.arange(number))))
        extra_N = self.extra_UK[unit_N, option_N] / self.slack
        result = milp(
            self.cost_UK[unit_N, option_N] * (len(self.units_U) / self.upper),
            integrality=np.ones(number),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(csr_array(extra_N[None]), -np.inf, allowed),
            ],
            options={"mip_rel_gap": RELATIVE_GAP},
        )
        if not result.success:
            raise LoraqError(
                f"HiGHS did not solve the allocation: status {result.status} ({result.message}). "
                "Use quant.allocation.kind=uniform."
            )
        chosen_U: np.ndarray = np.zeros(len(self.units_U), dtype=int)
        selected_N = result.x > 0.5
        chosen_U[unit_N[selected_N]] = option_N[selected_N]
        return chosen_U


def _padded(rows: Sequence[np.ndarray], fill: float) -> np.ndarray:
    """Rows of unequal length as one array (U, K), filled up with `fill`."""
    table_UK = np.full((len(rows), max(map(len, rows))), fill, dtype=np.result_type(rows[0], fill))
    for row_K, values_K in zip(table_UK, rows, strict=True):
        row_K[: len(values_K)] = values_K
    return table_UK
