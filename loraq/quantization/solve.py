"""Quantise one group: a batch of equal units through transform → branch → rounding.

Shapes: w_BOI units × out × in, x_BTI units × calibration rows × in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from loraq.config import Recipe
from loraq.layers.tensors import LayerTensors
from loraq.models.moments import Moment
from loraq.models.pointwise import finite_weight
from loraq.quantization.activations import Activations
from loraq.quantization.assemble import pack_group
from loraq.quantization.branch_solution import solve_branch
from loraq.quantization.group_context import GroupContext
from loraq.quantization.grouping import Group
from loraq.quantization.transform_search import choose_transform
from loraq.utils.memory import release_free_pages


@torch.no_grad()
def quantize_group(
    group: Group, transformer: nn.Module, recipe: Recipe, activations: Activations
) -> tuple[dict[str, LayerTensors], dict[str, Any]]:
    """The packed layers of `group` by name, and notes on the solution (losses, smoothing)."""
    recipe = group.allocation.apply_to(recipe)
    modules = {
        layer.name: transformer.get_submodule(layer.name) for u in group.units for layer in u.layers
    }
    weights = {name: finite_weight(transformer, name) for name in modules}
    w_BOI = torch.stack([unit.stack(weights) for unit in group.units])
    x_BTI = None
    if activations.rows is not None:
        rows = [activations.rows[unit.input_id].to(w_BOI.device) for unit in group.units]
        x_BTI = torch.stack([x_TI.float() for x_TI in rows])
    moments = _moments_of(group, recipe, activations)
    if moments is None:
        recipe = recipe.without_moments()
    context = GroupContext(group, recipe, w_BOI, x_BTI, moments)
    transform, notes = choose_transform(context, w_BOI)
    second_BII = context.second_moments(transform)
    root_BII, inverse_BII = context.weighting_roots(recipe.branch.weighting, transform, second_BII)
    problem = context.problem(transform.weight(w_BOI), transform, root_BII, inverse_BII)
    del w_BOI, weights  # problem holds the transformed copy
    if not transform.identity:  # the next steps allocate tensors of other sizes
        release_free_pages()
    solution = solve_branch(problem, recipe.branch)
    notes["losses"] = solution.losses
    if recipe.rounding.kind != "nearest":
        release_free_pages()
    return pack_group(context, problem.weight_BOI, transform, solution, second_BII, modules), notes


def _moments_of(group: Group, recipe: Recipe, activations: Activations) -> list[Moment] | None:
    """The moments of the units' inputs.

    None without moments, and for statistics=weights if the weights do not determine those of every
    unit.
    """
    held, ids = activations.moments, [unit.input_id for unit in group.units]
    if held is None or (recipe.statistics == "weights" and not all(i in held for i in ids)):
        return None
    return [held[i] for i in ids]
