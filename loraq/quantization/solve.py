"""Quantise one group: a batch of equal units through transform → branch → rounding.

Shapes: w_BOI units × out × in, x_BTI units × calibration rows × in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from loraq.branches.linear_algebra import root_and_inverse
from loraq.branches.lookup import find
from loraq.branches.problem import OutputError, Problem, Solution
from loraq.config import BranchConfig, Recipe
from loraq.formats import Format, fake_quantize, quantize
from loraq.formats.blocks import block_length
from loraq.formats.scales import scale_values
from loraq.layers.equation import quantized_linear
from loraq.layers.tensors import LayerTensors
from loraq.models.moments import Moment
from loraq.models.pointwise import weight_matrix
from loraq.quantization.activations import Activations
from loraq.quantization.assemble import pack
from loraq.quantization.grouping import Group
from loraq.transforms.hadamard import largest_block, random_signs
from loraq.transforms.input_transform import GELU_SHIFT, InputTransform
from loraq.transforms.smoothing import balanced_scale, candidates, grid, smoothing_scale
from loraq.utils.memory import release_free_pages

ROUNDING = 1e-5
"""Below this part of the mean, a negative square is float32 rounding of what is zero."""


@torch.no_grad()
def quantize_group(
    group: Group, transformer: nn.Module, recipe: Recipe, activations: Activations
) -> tuple[dict[str, LayerTensors], dict[str, Any]]:
    """The packed layers of `group`, and notes on how they were found (losses, smoothing)."""
    recipe = group.share.applied(recipe)
    modules = {
        layer.name: transformer.get_submodule(layer.name) for u in group.units for layer in u.layers
    }
    weights = {name: weight_matrix(module) for name, module in modules.items()}
    w_BOI = torch.stack([unit.stack(weights) for unit in group.units])
    x_BTI = None
    if activations.rows is not None:
        rows = [activations.rows[unit.input_id].float() for unit in group.units]
        x_BTI = torch.stack(rows).to(w_BOI)
    moments = _moments(group, recipe, activations)
    if moments is None:
        recipe = recipe.without_moments()
    step = _GroupStep(group, recipe, w_BOI, x_BTI, moments)
    transform, notes = step.choose_transform(w_BOI)
    second_BII = step.second_moments(transform)
    root_BII, inverse_BII = step.roots(recipe.branch.weighting, transform, second_BII)
    problem = step.problem(transform.weight(w_BOI), transform, root_BII, inverse_BII)
    del w_BOI, weights  # what a transform has made anew is held instead
    if not transform.identity:  # what it left free is in other sizes than what follows takes
        release_free_pages()
    solution = solve(problem, recipe.branch)
    notes["losses"] = solution.losses
    if recipe.rounding.kind != "nearest":
        release_free_pages()
    return pack(step, problem.weight_BOI, transform, solution, second_BII, modules), notes


def _moments(group: Group, recipe: Recipe, activations: Activations) -> list[Moment] | None:
    """The moments of the units' inputs; None where weights were asked and do not tell of them."""
    held, ids = activations.moments, [unit.input_id for unit in group.units]
    if held is None or (recipe.statistics == "weights" and not all(i in held for i in ids)):
        return None
    return [held[i] for i in ids]


def solve(problem: Problem, options: BranchConfig) -> Solution:
    """The branch that `options` ask for; factors of rank 0 where they ask for none."""
    if options.kind == "none":
        b, o, i = problem.weight_BOI.shape
        empty = problem.weight_BOI.new_zeros(b, o, 0), problem.weight_BOI.new_zeros(b, 0, i)
        error = problem.relative_error(problem.round_main(problem.weight_BOI)).mean().item()
        return Solution(*empty, residual=False, losses=[error])
    with torch.enable_grad():
        return find(problem, options)


class _GroupStep:
    """What the steps on one group share: formats, generator, calibration inputs."""

    def __init__(
        self,
        group: Group,
        recipe: Recipe,
        w_BOI: Tensor,
        x_BTI: Tensor | None,
        moments: Sequence[Moment] | None,
    ) -> None:
        self.group, self.recipe, self.rank = group, recipe, group.share.rank
        formats = recipe.formats()
        self.weight, self.branch = formats["weight"], formats["branch_weight"]
        self.branch_activation = formats["branch_activation"]
        self.shift = GELU_SHIFT if recipe.transform.shift and _follows_gelu(group) else 0.0
        self.activation = formats["activation"]
        if self.shift:
            # signed codes would leave half of their range unused on an input that is ≥ 0
            self.activation = replace(self.activation, name="uint4", family="uint")
        self.x_BTI = None if x_BTI is None else x_BTI + self.shift
        self.second_BII: Tensor | None = None
        if moments is not None:  # of x + c, like the rows
            second = torch.stack([moment.second_II for moment in moments]).to(w_BOI)
            mean_BI = torch.stack([moment.mean_I for moment in moments]).to(w_BOI)
            self.second_BII = InputTransform(shift=self.shift).moment(second, mean_BI)
        if self.x_BTI is not None:  # what candidates are judged by: transforms leave it unchanged
            self.y_BTO = self.x_BTI @ w_BOI.mT

    def generator(self, *purpose: str) -> torch.Generator:
        """Randomness from the recipe's seed and names alone, so the grouping does not matter."""
        text = "/".join((str(self.recipe.seed), *purpose))
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        return torch.Generator().manual_seed(seed)

    def choose_transform(self, w_BOI: Tensor) -> tuple[InputTransform, dict[str, Any]]:
        """The units' transforms as one with leading axes (B, 1, I), and notes."""
        transform = InputTransform(shift=self.shift)
        limit = self.recipe.transform.hadamard
        if limit and not self.shift:  # a rotated input would no longer be bounded below
            width = w_BOI.shape[-1]
            signs = [random_signs(width, self.generator("signs", u.name)) for u in self.group.units]
            block = largest_block(width, limit)
            transform = replace(
                transform, signs_I=torch.stack(signs)[:, None].to(w_BOI.device), block=block
            )
        if self.recipe.transform.smooth == "none":
            return transform, {}
        if self.recipe.transform.smooth == "search":
            return self._search_smoothing(w_BOI, transform)
        return replace(transform, smooth_I=self._given_smoothing(w_BOI)[:, None]), {}

    def _given_smoothing(self, w_BOI: Tensor) -> Tensor:
        """s_BI in closed form: balanced, or SmoothQuant's."""
        if self.recipe.transform.smooth == "balanced":
            assert self.second_BII is not None
            return balanced_scale(self.second_BII.diagonal(dim1=1, dim2=2).sqrt(), w_BOI)
        assert self.x_BTI is not None
        alpha = self.recipe.transform.migration
        xmax_BI, wmax_BI = self.x_BTI.abs().amax(-2), w_BOI.abs().amax(-2)
        return smoothing_scale(xmax_BI, wmax_BI, alpha, 1 - alpha)

    def _search_smoothing(
        self, w_BOI: Tensor, transform: InputTransform
    ) -> tuple[InputTransform, dict[str, Any]]:
        """The candidate of least output error, each judged with its own one-SVD branch."""
        assert self.x_BTI is not None
        asked = self.recipe.branch
        start = "error" if asked.start == "zero" else asked.start
        quick = BranchConfig(kind="svd", objective=asked.objective, start=start)
        if not self.rank:
            quick = BranchConfig(kind="none")
        best_B = torch.full((w_BOI.shape[0],), torch.inf, device=w_BOI.device)
        best_smooth = torch.ones_like(w_BOI[:, :1])
        choice_B = torch.zeros_like(best_B, dtype=torch.int64)
        for number, (_, s_BI) in enumerate(grid(self.x_BTI, w_BOI)):
            candidate = replace(transform, smooth_I=s_BI[:, None])
            problem = self.problem(candidate.weight(w_BOI), candidate)
            solution = solve(problem, quick)
            left, right = solution.left_BOR, solution.right_BRI
            target = problem.weight_BOI
            if solution.residual:
                target = target - problem.product(left, right)
            error_B = problem.measured_error(problem.round_main(target), left, right)
            better_B = error_B < best_B
            best_B = torch.where(better_B, error_B, best_B)
            choice_B = torch.where(better_B, number, choice_B)
            best_smooth[better_B] = s_BI[:, None][better_B]
        exponents = [list(candidates()[n]) for n in choice_B.tolist()]
        chosen = {unit.name: e for unit, e in zip(self.group.units, exponents, strict=True)}
        return replace(transform, smooth_I=best_smooth), {"smoothing": chosen}

    def second_moments(self, transform: InputTransform) -> Tensor | None:
        """E[x̃ᵀx̃] of the transformed inputs, which hold the shift already."""
        if self.second_BII is None:
            return None
        mean_BI = self.second_BII.new_zeros(self.second_BII.shape[:2])
        second_BII = replace(transform, shift=0.0).moment(self.second_BII, mean_BI)
        squares_BI = second_BII.diagonal(dim1=1, dim2=2)
        least_BI = -ROUNDING * squares_BI.mean(-1, keepdim=True)
        rounded_BI = (squares_BI < 0) & (squares_BI >= least_BI)  # of channels that say nothing
        squares_BI[rounded_BI] = 0.0
        return second_BII

    def problem(
        self,
        wt_BOI: Tensor,
        transform: InputTransform,
        root_BII: Tensor | None = None,
        inverse_BII: Tensor | None = None,
    ) -> Problem:
        """What a branch is found for."""
        return Problem(
            weight_BOI=wt_BOI,
            rank=self.rank,
            round_main=_batched(self.weight),
            round_branch=_batched(self.branch),
            generators=[self.generator("branch", unit.name) for unit in self.group.units],
            output_error=self._output_error(transform),
            root_BII=root_BII,
            inverse_root_BII=inverse_BII,
            step_main=_grid_step(self.weight),
        )

    def roots(
        self, weighting: str, transform: InputTransform, second_BII: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """S and S⁻¹ that weigh errors by the transformed input's statistics."""
        if weighting == "none":
            return None, None
        if weighting == "magnitude":
            magnitude_BI = self._transformed(transform).abs().mean(-2)
            return root_and_inverse(torch.diag_embed(magnitude_BI.square()))
        assert second_BII is not None
        if weighting == "diagonal":
            second_BII = torch.diag_embed(second_BII.diagonal(dim1=-2, dim2=-1))
        return root_and_inverse(second_BII)

    def _transformed(self, transform: InputTransform) -> Tensor:
        """x̃ of the calibration inputs, which hold the shift already."""
        assert self.x_BTI is not None
        return replace(transform, shift=0.0).input(self.x_BTI)

    def _output_error(self, transform: InputTransform) -> OutputError | None:
        """‖Y − Ŷ‖ / ‖Y‖ on the calibration inputs with everything quantised as it will run."""
        if self.x_BTI is None:
            return None
        xt_BTI, y_BTO = self._transformed(transform), self.y_BTO

        @torch.no_grad()
        def error(main_BOI: Tensor, left_BOR: Tensor, right_BRI: Tensor, units_B: Tensor) -> Tensor:
            estimate = quantized_linear(
                xt_BTI[units_B],
                main_BOI,
                self.activation,
                right_RI=right_BRI if self.rank else None,
                left_OR=left_BOR if self.rank else None,
                branch_activation=self.branch_activation,
                requantize_intermediate=self.recipe.requantize_intermediate,
            )
            y = y_BTO[units_B]
            return (estimate - y).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1).clamp_min(1e-30)

        return error


def _follows_gelu(group: Group) -> bool:
    return all(layer.after_gelu for unit in group.units for layer in unit.layers)


def _batched(fmt: Format) -> Callable[[Tensor], Tensor]:
    """Q of each unit by itself; only formats with one scale per tensor need a loop for that."""
    per_tensor = fmt.block == -1 or fmt.family == "nvfp"
    if per_tensor:
        return lambda w_BOI: torch.stack([fake_quantize(w_OI, fmt) for w_OI in w_BOI])
    return lambda w_BOI: fake_quantize(w_BOI, fmt)


def _grid_step(fmt: Format) -> Callable[[Tensor], Tensor] | None:
    """The spacing of Q's grid at each value, where it is even within a block."""
    if fmt.family not in ("int", "mxint") or fmt.block == -1:
        return None

    def step(w_BOI: Tensor) -> Tensor:
        stored = quantize(w_BOI, fmt)
        assert stored.scale is not None
        scale = scale_values(stored.scale, fmt) * 2.0**-fmt.element.fraction_bits
        block = block_length(fmt, w_BOI.shape[-1])
        return scale.repeat_interleave(block, -1)[..., : w_BOI.shape[-1]]

    return step
