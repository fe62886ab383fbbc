"""The activations that a calibrated recipe reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from loraq.config import Recipe
from loraq.errors import LoraqError
from loraq.models.moments import Moment


@dataclass(frozen=True)
class Activations:
    """Calibration data of the 16-bit model; None for what was not captured.

    rows: input id → (rows, in); moments: input id → `Moment`; sensitivity: unit → how much its
    error affects the transformer's output.
    """

    rows: Mapping[str, Tensor] | None = None
    moments: Mapping[str, Moment] | None = None
    sensitivity: Mapping[str, float] | None = None

    def __repr__(self) -> str:
        held = (
            f"{name}=<{len(value)}>"
            for name in ("rows", "moments", "sensitivity")
            if (value := getattr(self, name)) is not None
        )
        return f"Activations({', '.join(held)})"

    def restricted_to(self, recipe: Recipe) -> Activations:
        """Only the data that `recipe` reads, none if it is data-free.

        Raises LoraqError if data that the recipe needs is None.
        """
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
