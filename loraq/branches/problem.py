"""Input and output of a branch finder.

Every finder takes a `Problem` (a batch of units of equal shape) and returns a `Solution`. A unit is
one layer, or the stacked layers that share R (q/k/v): rows are quantised independently, so a stack
is a weight with more rows. Shapes: w_BOI units × out × in, left_BOR, right_BRI.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from loraq.errors import LoraqError

OutputError = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(main weight, left_BOR, right_BRI, unit indices (B,)) → calibration ‖Y − Ŷ‖ / ‖Y‖ per unit."""


@dataclass(frozen=True)
class Problem:
    """The input of a branch finder: a batch of weights, the rank and the rounding functions.

    round_main, round_branch: Qw and Qbw; they map a float tensor to its dequantised values.
    generators: one per unit, so that a unit does not depend on its batch.
    output_error: the error on calibration inputs; None for data-free methods.
    units_B: indices of the units in the complete problem; None for all.
    root_BII, inverse_root_BII: S = E[xᵀx]^½ (or its diagonal) and S⁻¹, which weight the errors by
        the inputs; None without a weighting.
    step_main: the spacing of Qw's grid at each value; None for a non-uniform grid.
    """

    weight_BOI: Tensor
    rank: int
    round_main: Callable[[Tensor], Tensor]
    round_branch: Callable[[Tensor], Tensor]
    generators: Sequence[torch.Generator]
    output_error: OutputError | None = None
    units_B: Tensor | None = None
    root_BII: Tensor | None = None
    inverse_root_BII: Tensor | None = None
    step_main: Callable[[Tensor], Tensor] | None = None

    def __repr__(self) -> str:
        units, out, width = self.weight_BOI.shape
        return f"Problem({units} units of {out} × {width}, rank={self.rank})"

    def subset(self, units_B: Tensor) -> Problem:
        """The problem of some of its units, by index (B,)."""
        generators = [self.generators[b] for b in units_B.tolist()]
        weight_BOI = self.weight_BOI[units_B]
        roots = [None if r is None else r[units_B] for r in (self.root_BII, self.inverse_root_BII)]
        return replace(
            self,
            weight_BOI=weight_BOI,
            units_B=units_B,
            generators=generators,
            root_BII=roots[0],
            inverse_root_BII=roots[1],
        )

    def weighted(self, x_BNI: Tensor) -> Tensor:
        """x·S with S = E[xᵀx]^½, so that errors are measured at the layer's output.

        Without a weighting, x unchanged.
        """
        return x_BNI if self.root_BII is None else x_BNI @ self.root_BII

    def unweighted(self, x_BNI: Tensor) -> Tensor:
        """x·S⁻¹, the inverse of `weighted`."""
        return x_BNI if self.inverse_root_BII is None else x_BNI @ self.inverse_root_BII

    def measured_error(self, main_BOI: Tensor, left_BOR: Tensor, right_BRI: Tensor) -> Tensor:
        """‖Y − Ŷ‖ / ‖Y‖ per unit (B,) with the quantised branch; LoraqError if data-free."""
        if self.output_error is None:
            raise LoraqError(
                "This method needs calibration inputs, but none were given. Pass `inputs`."
            )
        units_B = self.units_B
        if units_B is None:
            units_B = torch.arange(self.weight_BOI.shape[0], device=main_BOI.device)
        left, right = left_BOR, right_BRI
        if left_BOR.shape[-1]:  # formats cannot quantise an empty factor
            left, right = self.round_branch(left_BOR), self.round_branch(right_BRI)
        return self.output_error(main_BOI, left, right, units_B)

    def product(self, left_BOR: Tensor, right_BRI: Tensor) -> Tensor:
        """P = Qbw(L)·Qbw(R), the product of the quantised factors."""
        return self.round_branch(left_BOR) @ self.round_branch(right_BRI)

    def relative_error(self, estimate_BOI: Tensor) -> Tensor:
        """‖W − Ŵ‖_F / ‖W‖_F per unit (B,), or ‖(W − Ŵ)S‖_F / ‖WS‖_F with a weighting S."""
        return self.relative(self.weight_BOI - estimate_BOI)

    def relative(self, error_BOI: Tensor) -> Tensor:
        """`relative_error` for a given W − Ŵ."""
        return self.weighted(error_BOI).flatten(1).norm(dim=1) / self.weight_norm

    @functools.cached_property
    def weight_norm(self) -> Tensor:
        """‖W‖_F per unit (B,), or ‖WS‖_F with a weighting S."""
        return self.weighted(self.weight_BOI).flatten(1).norm(dim=1).clamp_min(1e-30)


@dataclass
class Solution:
    """The output of a branch finder: float factors, which are quantised when they are stored.

    residual: if True the main weight is Q(W − P), else Q(W) (objective O1, LQER).
    losses: the mean relative error of each round, for the record and its plot.
    """

    left_BOR: Tensor
    right_BRI: Tensor
    residual: bool
    losses: list[float] = field(default_factory=list)

    def __repr__(self) -> str:
        (units, out, rank), width = self.left_BOR.shape, self.right_BRI.shape[-1]
        last = f", last loss={self.losses[-1]:.4g}" if self.losses else ""
        return (
            f"Solution({units} units of {out} × {width}, rank={rank}, residual={self.residual}, "
            f"{len(self.losses)} rounds{last})"
        )
