"""How the low-rank factors L and R are found. One file a kind; `find` looks it up by name.

Every finder takes a `Problem` (a batch of equal-shaped units) and returns a `Solution`. A unit is a
layer, or the stacked layers that share R (q/k/v): rows are quantised independently, so a stack is
simply a taller weight. Shapes: w_BOI units × out × in, left_BOR, right_BRI.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from loraq.errors import LoraqError

OutputError = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(main Ŵ_BOI, left_BOR, right_BRI, which units (B,)) → ‖Y − Ŷ‖ / ‖Y‖ per unit, on calibration."""


@dataclass(frozen=True)
class Problem:
    """What a finder may look at.

    `round_main` is Qw (the rounding of the main weight), `round_branch` Qbw; both map a float
    tensor to the values its stored form decodes to. `generators` hold each unit's own randomness,
    so that a unit does not depend on its batch. `output_error` is None for a method that is
    data-free: it cannot reach activations; so are `root_BII` and its inverse, which weigh errors
    by the inputs' second moment (E[xᵀx]^½, or the diagonal one).
    `step_main` gives the spacing of Qw's grid at each value, where it is even.
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

    def subset(self, units_B: Tensor) -> Problem:
        """The same problem for some of its units, by their numbers (B,)."""
        kept = [self.generators[b] for b in units_B.tolist()]
        weight_BOI = self.weight_BOI[units_B]
        roots = [None if r is None else r[units_B] for r in (self.root_BII, self.inverse_root_BII)]
        return replace(
            self,
            weight_BOI=weight_BOI,
            units_B=units_B,
            generators=kept,
            root_BII=roots[0],
            inverse_root_BII=roots[1],
        )

    def weighted(self, x_BNI: Tensor) -> Tensor:
        """x·S: errors as the layer's output sees them; x itself where nothing weighs."""
        return x_BNI if self.root_BII is None else x_BNI @ self.root_BII

    def unweighted(self, x_BNI: Tensor) -> Tensor:
        """x·S⁻¹, the inverse of `weighted`."""
        return x_BNI if self.inverse_root_BII is None else x_BNI @ self.inverse_root_BII

    def measured_error(self, main_BOI: Tensor, left_BOR: Tensor, right_BRI: Tensor) -> Tensor:
        """‖Y − Ŷ‖ / ‖Y‖ per unit (B,), the branch as it will run; LoraqError when data-free."""
        if self.output_error is None:
            raise LoraqError(
                "This method reads calibration inputs and none were given; pass `inputs`."
            )
        units_B = self.units_B
        if units_B is None:
            units_B = torch.arange(self.weight_BOI.shape[0], device=main_BOI.device)
        left, right = left_BOR, right_BRI
        if left_BOR.shape[-1]:  # of rank 0 there is nothing to round
            left, right = self.round_branch(left_BOR), self.round_branch(right_BRI)
        return self.output_error(main_BOI, left, right, units_B)

    def product(self, left_BOR: Tensor, right_BRI: Tensor) -> Tensor:
        """P = Qbw(L)·Qbw(R), the branch as it will run."""
        return self.round_branch(left_BOR) @ self.round_branch(right_BRI)

    def relative_error(self, estimate_BOI: Tensor) -> Tensor:
        """‖W − Ŵ‖_F / ‖W‖_F per unit (B,), or ‖(W − Ŵ)S‖_F / ‖WS‖_F where S weighs."""
        return self.relative(self.weight_BOI - estimate_BOI)

    def relative(self, missed_BOI: Tensor) -> Tensor:
        """The same of W − Ŵ, for those who have it at hand."""
        return self.weighted(missed_BOI).flatten(1).norm(dim=1) / self.weight_norm

    @functools.cached_property
    def weight_norm(self) -> Tensor:
        return self.weighted(self.weight_BOI).flatten(1).norm(dim=1).clamp_min(1e-30)


@dataclass
class Solution:
    """Float factors (they are quantised once, when they are stored) and what main still rounds.

    `residual`: main holds Q(W − P) where True, Q(W) where False (objective O1, LQER).
    `losses`: one mean relative error a round, for the record and its plot.
    """

    left_BOR: Tensor
    right_BRI: Tensor
    residual: bool
    losses: list[float] = field(default_factory=list)
