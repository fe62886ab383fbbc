"""The activations that a calibrated recipe reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraq.config import Recipe
from loraq.errors import LoraqError
from loraq.formats.quantization import all_finite
from loraq.models.layers import Layer
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

        Raises LoraqError if data that the recipe needs is None, or contains NaN or Inf.
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
        found = Activations(**kept)
        found._check_finite()
        return found

    def check_read(self, layers: Sequence[Layer]) -> None:
        """LoraqError if the calibration never ran some of the layers, so that data is missing."""
        for held in (self.rows, self.moments):
            known = held if held is not None else {layer.shares_input for layer in layers}
            if idle := [layer.name for layer in layers if layer.shares_input not in known]:
                raise LoraqError(
                    f"No step of the calibration runs {len(idle)} of {len(layers)} layers, such as "
                    f"'{idle[0]}' (an expert for other steps, or one that no token chooses). Raise "
                    "model.steps or calibration.prompts, leave the layers in 16 bits (quant.skip), "
                    "or use a recipe that reads only weights (method=loraq_o2)."
                )

    def _check_finite(self) -> None:
        held: dict[str, Iterable[tuple[str, Tensor]]] = {
            "rows": (self.rows or {}).items(),
            "second moments": ((n, moment.second_II) for n, moment in (self.moments or {}).items()),
        }
        for what, tensors in held.items():
            for name, tensor in tensors:
                if not all_finite(tensor):
                    raise LoraqError(
                        f"The captured {what} of input '{name}' contain NaN or Inf: the 16-bit "
                        f"model's activations leave the range of its dtype, or have squares above "
                        f"{torch.finfo(torch.float32).max:.1e}. Set model.dtype=bfloat16 or "
                        "float32, or use a recipe that reads only weights (method=loraq_o2)."
                    )
