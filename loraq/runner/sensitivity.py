"""How much the transformer's output reacts to an error of one layer, or of layers that share R."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from loraq.config import BranchConfig, Recipe
from loraq.errors import LoraqError
from loraq.models.pointwise import channels_last, weight_matrix
from loraq.quantization.grouping import Unit
from loraq.quantization.quantizer import quantize_model
from loraq.runner.trajectories import Forward, check_recorded, squared_errors


@torch.inference_mode()
def measure_sensitivity(
    transformer: nn.Module,
    units: Sequence[Unit],
    recipe: Recipe,
    forwards: Sequence[Forward],
    progress: str | None = "sensitivity",
) -> dict[str, float]:
    """Sensitivity of the transformer's output to each unit's error, by the unit's name.

        s_u = (‖f̂ − f‖² / ‖f‖²) / (‖Ŷ − Y‖² / ‖Y‖²)       pooled over all forwards

    In f̂ only unit u is quantised: rounded to nearest in the recipe's weight and activation
    formats, without transform or branch. Y = x·Wᵀ is the unit's output on its 16-bit inputs
    (without bias, pooled over the unit's layers). s_u is 0 if these formats represent the unit
    exactly. To first order, any error e_u of a unit adds s_u·e_u² to the squared output error.

    progress: label of the bar, which counts units; None: no bar.
    """
    from tqdm import tqdm

    check_recorded(forwards)
    plain = Recipe(
        weight=recipe.weight, activation=recipe.activation, branch=BranchConfig(kind="none")
    )
    found = {}
    for unit in tqdm(units, desc=progress, unit="unit", disable=progress is None):
        quantized = quantize_model(transformer, unit.layers, plain, progress=None)
        originals = {name: transformer.get_submodule(name) for name in quantized.layers}
        with quantized.applied(transformer):
            weight = weight_matrix(next(iter(originals.values())))
            sums, handles = weight.new_zeros(3, dtype=torch.float64), []
            try:
                for name, original in originals.items():
                    hook = _error_sum(original, sums)
                    replacement = transformer.get_submodule(name)
                    handles.append(replacement.register_forward_hook(hook))
                pairs = squared_errors(transformer, forwards)
            finally:
                for handle in handles:
                    handle.remove()
        error, norm = (sum(column) for column in zip(*pairs, strict=True))
        wrong, whole, calls = sums.tolist()
        if not calls:
            raise LoraqError(
                f"No recorded step runs '{unit.name}' (an expert for other steps, or one that no "
                "token chooses), so that its sensitivity is not known. Raise model.steps, leave it "
                "in 16 bits (quant.skip), or set quant.allocation.sensitivity=weights."
            )
        layer_error = wrong / whole if wrong else 0.0
        found[unit.name] = error / norm / layer_error if layer_error else 0.0
    return found


def _error_sum(original: nn.Module, sums: Tensor) -> Callable[..., None]:
    """A forward hook of a quantised layer that adds [‖Ŷ − Y‖², ‖Y‖², 1] on its input to `sums`."""
    weight, bias = weight_matrix(original).float(), original.bias

    def add(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        y = channels_last(original, args[0]).float() @ weight.mT
        error = (
            channels_last(original, output).float() - y - (0.0 if bias is None else bias.float())
        )
        squares = [part.square().sum(dtype=torch.float64) for part in (error, y)]
        sums.add_(torch.stack([*squares, torch.ones_like(squares[0])]))

    return add
