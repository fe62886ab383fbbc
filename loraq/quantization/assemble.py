"""Pack a solved group: quantise factors, round main weights, split stacks into their layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from loraq.branches.problem import Solution
from loraq.formats import QuantizedTensor, dequantize, quantize
from loraq.layers.tensors import LayerTensors
from loraq.models.pointwise import weight_matrix
from loraq.quantization.group_context import GroupContext
from loraq.quantization.grouping import Unit
from loraq.rounding import round_weights
from loraq.transforms.input_transform import InputTransform


def pack_group(
    context: GroupContext,
    wt_BOI: Tensor,
    transform: InputTransform,
    solution: Solution,
    second_BII: Tensor | None,
    modules: Mapping[str, nn.Module],
) -> dict[str, LayerTensors]:
    """The packed layers of a group by name.

    Units are rounded as the stacks that the branch was found for, then split into layers, which
    share R. second_BII: second moments of the transformed inputs, for roundings that read them.
    """
    factors: list[tuple[QuantizedTensor, QuantizedTensor]] = []
    target_BOI = wt_BOI
    if context.rank:
        factors = [
            (quantize(left, context.branch_format), quantize(right, context.branch_format))
            for left, right in zip(solution.left_BOR, solution.right_BRI, strict=True)
        ]
        if solution.residual:
            target_BOI = wt_BOI.clone()
            for target_OI, (left, right) in zip(target_BOI, factors, strict=True):
                target_OI -= dequantize(left) @ dequantize(right)
    weights = round_weights(target_BOI, context.weight_format, second_BII, context.recipe.rounding)
    packed: dict[str, LayerTensors] = {}
    for b, unit in enumerate(context.group.units):
        unit_transform = replace(
            transform,
            smooth_I=None if transform.smooth_I is None else transform.smooth_I[b, 0].clone(),
            signs_I=None if transform.signs_I is None else transform.signs_I[b, 0].clone(),
        )
        branch = factors[b] if factors else None
        packed |= _pack_unit(context, unit, unit_transform, weights[b], branch, modules)
    return packed


def _pack_unit(
    context: GroupContext,
    unit: Unit,
    transform: InputTransform,
    weight: QuantizedTensor,
    branch: tuple[QuantizedTensor, QuantizedTensor] | None,
    modules: Mapping[str, nn.Module],
) -> dict[str, LayerTensors]:
    packed, start = {}, 0
    for layer in unit.layers:
        rows = slice(start, start + layer.shape[0])
        start = rows.stop
        module = modules[layer.name]
        bias = None if module.bias is None else module.bias.detach()
        bias_O = transform.bias(bias, weight_matrix(module).float())
        packed[layer.name] = LayerTensors(
            weight=weight.rows(rows),
            activation=context.activation_format,
            transform=transform,
            left=None if branch is None else branch[0].rows(rows),
            right=None if branch is None else branch[1],
            branch_activation=None if branch is None else context.branch_activation_format,
            requantize_intermediate=context.recipe.requantize_intermediate,
            bias_O=None if bias_O is None else bias_O.float(),
        )
    return packed
