"""What the steps on one group share: formats, seeded generators, calibration inputs.

Shapes: w_BOI units × out × in, x_BTI units × calibration rows × in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from loraq.branches.linear_algebra import root_and_inverse
from loraq.branches.problem import OutputError, Problem
from loraq.config import Recipe
from loraq.formats import Format, fake_quantize
from loraq.formats.blocks import block_length, stored_scales, to_blocks
from loraq.formats.elements import IntegerElement
from loraq.formats.scales import scale_values
from loraq.layers.equation import quantized_linear
from loraq.models.moments import Moment
from loraq.quantization.grouping import Group
from loraq.transforms.input_transform import GELU_SHIFT, InputTransform

ROUND_OFF = 1e-5
"""Negative diagonal entries of E[xᵀx] smaller than this fraction of the mean are float32 round-off
and are set to 0."""


class GroupContext:
    """Formats, seeded generators and calibration inputs of one group; builds branch problems.

    x_BTI: rows of the units' inputs, and moments: one per unit; None if the recipe reads none.
    """

    def __init__(
        self,
        group: Group,
        recipe: Recipe,
        w_BOI: Tensor,
        x_BTI: Tensor | None,
        moments: Sequence[Moment] | None,
    ) -> None:
        self.group, self.recipe, self.rank = group, recipe, group.allocation.rank
        formats = recipe.formats()
        self.weight_format, self.branch_format = formats["weight"], formats["branch_weight"]
        self.branch_activation_format = formats["branch_activation"]
        self.shift = GELU_SHIFT if recipe.transform.shift and _follows_gelu(group) else 0.0
        self.activation_format = formats["activation"]
        if self.shift:
            # signed codes would leave half of their range unused on an input that is ≥ 0
            self.activation_format = replace(self.activation_format, name="uint4", family="uint")
        self.x_BTI = None if x_BTI is None else x_BTI + self.shift
        self.second_BII: Tensor | None = None
        if moments is not None:  # of the shifted input, as x_BTI
            second = torch.stack([moment.second_II for moment in moments]).to(w_BOI)
            mean_BI = torch.stack([moment.mean_I for moment in moments]).to(w_BOI)
            self.second_BII = InputTransform(shift=self.shift).moment(second, mean_BI)
        if self.x_BTI is not None:  # the target of output errors: transforms leave it unchanged
            self.y_BTO = self.x_BTI @ w_BOI.mT

    def __repr__(self) -> str:
        return f"GroupContext({self.group!r}, rank {self.rank})"

    def generator(self, *purpose: str) -> torch.Generator:
        """A generator seeded by the recipe's seed and `purpose`, independent of the grouping."""
        text = "/".join((str(self.recipe.seed), *purpose))
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        return torch.Generator().manual_seed(seed)

    def second_moments(self, transform: InputTransform) -> Tensor | None:
        """E[x̃ᵀx̃] of the transformed inputs (B, I, I); None without moments."""
        if self.second_BII is None:
            return None
        mean_BI = self.second_BII.new_zeros(self.second_BII.shape[:2])
        # second_BII is of the shifted input already
        second_BII = replace(transform, shift=0.0).moment(self.second_BII, mean_BI)
        squares_BI = second_BII.diagonal(dim1=1, dim2=2)
        least_BI = -ROUND_OFF * squares_BI.mean(-1, keepdim=True)
        round_off_BI = (squares_BI < 0) & (squares_BI >= least_BI)
        squares_BI[round_off_BI] = 0.0
        return second_BII

    def problem(
        self,
        wt_BOI: Tensor,
        transform: InputTransform,
        root_BII: Tensor | None = None,
        inverse_BII: Tensor | None = None,
    ) -> Problem:
        """The branch problem of the transformed weights."""
        return Problem(
            weight_BOI=wt_BOI,
            rank=self.rank,
            round_main=_rounding_per_unit(self.weight_format),
            round_branch=_rounding_per_unit(self.branch_format),
            generators=[self.generator("branch", unit.name) for unit in self.group.units],
            output_error=self._output_error(transform),
            root_BII=root_BII,
            inverse_root_BII=inverse_BII,
            step_main=_grid_spacing(self.weight_format),
        )

    def weighting_roots(
        self, weighting: str, transform: InputTransform, second_BII: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """S = E[x̃ᵀx̃]^½ as `branch.weighting` approximates it, and S⁻¹; None for `none`."""
        if weighting == "none":
            return None, None
        if weighting == "magnitude":
            magnitude_BI = self._transformed_inputs(transform).abs().mean(-2)
            return root_and_inverse(torch.diag_embed(magnitude_BI.square()))
        assert second_BII is not None
        if weighting == "diagonal":
            second_BII = torch.diag_embed(second_BII.diagonal(dim1=-2, dim2=-1))
        return root_and_inverse(second_BII)

    def _transformed_inputs(self, transform: InputTransform) -> Tensor:
        """x̃ of the calibration rows, which include the shift already."""
        assert self.x_BTI is not None
        return replace(transform, shift=0.0).input(self.x_BTI)

    def _output_error(self, transform: InputTransform) -> OutputError | None:
        """‖Y − Ŷ‖ / ‖Y‖ on the calibration rows, all operands quantised as in inference."""
        if self.x_BTI is None:
            return None
        xt_BTI, y_BTO = self._transformed_inputs(transform), self.y_BTO

        @torch.no_grad()
        def error(main_BOI: Tensor, left_BOR: Tensor, right_BRI: Tensor, units_B: Tensor) -> Tensor:
            estimate = quantized_linear(
                xt_BTI[units_B],
                main_BOI,
                self.activation_format,
                right_RI=right_BRI if self.rank else None,
                left_OR=left_BOR if self.rank else None,
                branch_activation=self.branch_activation_format,
                requantize_intermediate=self.recipe.requantize_intermediate,
            )
            y = y_BTO[units_B]
            return (estimate - y).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1).clamp_min(1e-30)

        return error


def _follows_gelu(group: Group) -> bool:
    return group.units[0].after_gelu


def _rounding_per_unit(fmt: Format) -> Callable[[Tensor], Tensor]:
    """Q applied to each unit of a batch; a scale per tensor must not span several units."""
    per_tensor = fmt.block == -1 or fmt.family == "nvfp"
    if per_tensor:
        return lambda w_BOI: torch.stack([fake_quantize(w_OI, fmt) for w_OI in w_BOI])
    return lambda w_BOI: fake_quantize(w_BOI, fmt)


def _grid_spacing(fmt: Format) -> Callable[[Tensor], Tensor] | None:
    """The spacing of Q's grid at each value; None if the grid is not uniform within a block."""
    if fmt.family not in ("int", "mxint") or fmt.block == -1:
        return None
    element = fmt.element
    assert isinstance(element, IntegerElement)

    def spacing(w_BOI: Tensor) -> Tensor:
        block = block_length(fmt, w_BOI.shape[-1])
        blocks_BONK = to_blocks(w_BOI.float(), block)
        stored_BON = stored_scales(blocks_BONK, blocks_BONK.abs().amax(-1), fmt, None)
        scale = scale_values(stored_BON, fmt) * 2.0**-element.fraction_bits
        return scale.repeat_interleave(block, -1)[..., : w_BOI.shape[-1]]

    return spacing
