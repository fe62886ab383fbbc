"""The activations that a calibrated recipe may read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from loraq.config import Recipe
from loraq.errors import LoraqError
from loraq.models.moments import Moment


@dataclass(frozen=True)
class Activations:
    """What a calibrated recipe may read of the 16-bit model's activations; None where it may not.

    rows: input id → (rows, in); moments: input id → `Moment`; sensitivity: unit → how much its
    error matters to the transformer's output.
    """

    rows: Mapping[str, Tensor] | None = None
    moments: Mapping[str, Moment] | None = None
    sensitivity: Mapping[str, float] | None = None

    def allowed(self, recipe: Recipe) -> Activations:
        """Only what `recipe` reads: a data-free recipe gets nothing. LoraqError where it lacks."""
        wanted = {
            "rows": (recipe.needs_rows, "transform.smooth or branch.select=output"),
            "moments": (recipe.needs_moments, "rounding=gptq or branch.weighting"),
            "sensitivity": (recipe.needs_sensitivity, "allocation.sensitivity=activations"),
        }
        kept = {}
        for name, (needed, setting) in wanted.items():
            kept[name] = getattr(self, name) if needed else None
            if needed and kept[name] is None:
                raise LoraqError(
                    f"This recipe reads activations ({setting}), and no calibration {name} were "
                    "given. Pass them, or use a data-free recipe."
                )
        return Activations(**kept)
