"""Choose a group's input transform: shift, smoothing in closed form or by search, rotation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from loraq.branches.svd import start_factors
from loraq.config import BranchConfig
from loraq.quantization.group_context import GroupContext
from loraq.transforms.hadamard import largest_block, random_signs, regular_signs
from loraq.transforms.input_transform import InputTransform
from loraq.transforms.smoothing import balanced_scale, candidates, grid, smoothing_scale


def choose_transform(context: GroupContext, w_BOI: Tensor) -> tuple[InputTransform, dict[str, Any]]:
    """The units' transforms as one with leading axes (B, 1, I), and notes on the search."""
    transform = InputTransform(shift=context.shift)
    limit = context.recipe.transform.hadamard
    if limit and not context.shift:  # a rotated input would no longer be bounded below
        width, regular = w_BOI.shape[-1], context.recipe.transform.signs == "regular"
        block = largest_block(width, limit, regular)
        signs = [
            regular_signs(width, block)
            if regular
            else random_signs(width, context.generator("signs", unit.name))
            for unit in context.group.units
        ]
        transform = replace(
            transform, signs_I=torch.stack(signs)[:, None].to(w_BOI.device), block=block
        )
    if context.recipe.transform.smooth == "none":
        return transform, {}
    if context.recipe.transform.smooth == "search":
        return _search_smoothing(context, w_BOI, transform)
    return replace(transform, smooth_I=_closed_form_smoothing(context, w_BOI)[:, None]), {}


def _closed_form_smoothing(context: GroupContext, w_BOI: Tensor) -> Tensor:
    """s_BI of smooth=balanced, or SmoothQuant's (smooth=fixed)."""
    if context.recipe.transform.smooth == "balanced":
        assert context.second_BII is not None
        return balanced_scale(context.second_BII.diagonal(dim1=1, dim2=2).sqrt(), w_BOI)
    assert context.x_BTI is not None
    alpha = context.recipe.transform.migration
    xmax_BI, wmax_BI = context.x_BTI.abs().amax(-2), w_BOI.abs().amax(-2)
    return smoothing_scale(xmax_BI, wmax_BI, alpha, 1 - alpha)


def _search_smoothing(
    context: GroupContext, w_BOI: Tensor, transform: InputTransform
) -> tuple[InputTransform, dict[str, Any]]:
    """The candidate of the smallest output error, each with a branch from one SVD."""
    assert context.x_BTI is not None
    branch = context.recipe.branch
    start = "error" if branch.start == "zero" else branch.start
    one_svd = BranchConfig(kind="svd", objective=branch.objective, start=start)
    b, o, i = w_BOI.shape
    left, right = w_BOI.new_zeros(b, o, 0), w_BOI.new_zeros(b, 0, i)
    best_B = torch.full((w_BOI.shape[0],), torch.inf, device=w_BOI.device)
    best_smooth = torch.ones_like(w_BOI[:, :1])
    choice_B = torch.zeros_like(best_B, dtype=torch.int64)
    for number, (_, s_BI) in enumerate(grid(context.x_BTI, w_BOI)):
        candidate = replace(transform, smooth_I=s_BI[:, None])
        problem = context.problem(candidate.weight(w_BOI), candidate)
        target = problem.weight_BOI
        if context.rank:
            left, right = start_factors(problem, one_svd)
            if branch.objective == "shape":
                target = target - problem.product(left, right)
        error_B = problem.measured_error(problem.round_main(target), left, right)
        better_B = error_B < best_B
        best_B = torch.where(better_B, error_B, best_B)
        choice_B = torch.where(better_B, number, choice_B)
        best_smooth = torch.where(better_B[:, None, None], s_BI[:, None], best_smooth)
    exponents = [list(candidates()[n]) for n in choice_B.tolist()]
    chosen = {unit.name: e for unit, e in zip(context.group.units, exponents, strict=True)}
    return replace(transform, smooth_I=best_smooth), {"smoothing": chosen}
