"""Store a solved group: factors quantised, the rest rounded, stacks cut into their layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor, nn

from loraq.branches.problem import Solution
from loraq.config import Recipe
from loraq.formats import Format, QuantizedTensor, dequantize, quantize
from loraq.layers.tensors import LayerTensors
from loraq.models.pointwise import weight_matrix
from loraq.quantization.grouping import Group, Unit
from loraq.rounding import round_weights
from loraq.transforms.input_transform import InputTransform


class Step(Protocol):
    """What packing reads of the step on a group (`group.py`)."""

    group: Group
    recipe: Recipe
    rank: int
    weight: Format
    activation: Format
    branch: Format
    branch_activation: Format


def pack(
    step: Step,
    wt_BOI: Tensor,
    transform: InputTransform,
    solution: Solution,
    second_BII: Tensor | None,
    modules: Mapping[str, nn.Module],
) -> dict[str, LayerTensors]:
    """Store the units: rounded as the stacks they were judged as, then cut; R once a unit.

    second_BII: second moments of the transformed inputs, for roundings that read them.
    """
    factors: list[Any] = [(None, None)] * len(wt_BOI)
    target_BOI = wt_BOI
    if step.rank:
        factors = [
            (quantize(left, step.branch), quantize(right, step.branch))
            for left, right in zip(solution.left_BOR, solution.right_BRI, strict=True)
        ]
        if solution.residual:
            target_BOI = wt_BOI.clone()
            for target_OI, (left, right) in zip(target_BOI, factors, strict=True):
                target_OI -= dequantize(left) @ dequantize(right)
    weights = round_weights(target_BOI, step.weight, second_BII, step.recipe.rounding)
    packed: dict[str, LayerTensors] = {}
    for b, unit in enumerate(step.group.units):
        own = replace(
            transform,
            smooth_I=None if transform.smooth_I is None else transform.smooth_I[b, 0].clone(),
            signs_I=None if transform.signs_I is None else transform.signs_I[b, 0].clone(),
        )
        packed |= _pack_unit(step, unit, own, weights[b], *factors[b], modules)
    return packed


def _pack_unit(
    step: Step,
    unit: Unit,
    own: InputTransform,
    weight: QuantizedTensor,
    left: QuantizedTensor | None,
    right: QuantizedTensor | None,
    modules: Mapping[str, nn.Module],
) -> dict[str, LayerTensors]:
    packed, start = {}, 0
    for layer in unit.layers:
        rows = slice(start, start + layer.shape[0])
        start = rows.stop
        module = modules[layer.name]
        bias = None if module.bias is None else module.bias.detach()
        bias_O = own.bias(bias, weight_matrix(module).float())
        packed[layer.name] = LayerTensors(
            weight=weight.rows(rows),
            activation=step.activation,
            transform=own,
            left=None if left is None else left.rows(rows),
            right=right,
            branch_activation=None if right is None else step.branch_activation,
            requantize_intermediate=step.recipe.requantize_intermediate,
            bias_O=None if bias_O is None else bias_O.float(),
        )
    return packed
