"""GPTQ: columns are rounded one by one, and later columns compensate each column's error.

    H = E[x̃ᵀx̃] + damp · mean(diag E[x̃ᵀx̃]) · I,    H⁻¹ = Uᵀ·U, U upper,
    q_i = round(w_i),    w_j -= (w_i − q_i) · U_ij / U_ii  for every j > i

(Frantar et al., arXiv 2210.17323, algorithm 1). Columns are processed in chunks S. With H = R·Rᵀ,
R upper, so that U = R⁻¹, the chunk after the compensation of all columns before it (< S) is

    w_S + (W − Q)_<S · R_<S,S · U_SS,    U_SS = (R_SS)⁻¹

which is one product with the original W: H is factored once, and only the diagonal blocks of R are
inverted.

The format chooses a block's scale from the block's values at its first column. With act_order the
columns of a block are not adjacent, and all scales come from the target.

Letters: B units, O out, I in, K columns of a chunk, N scale blocks of a row. Computed in float64
with the columns as the first axis, so that a column is contiguous. Products are computed per unit
on separate memory, so that the bits of a unit do not depend on the other units.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from loraq.config import RoundingConfig
from loraq.errors import LoraqError
from loraq.formats import Format, QuantizedTensor, quantize
from loraq.formats.blocks import block_length, find_tensor_scale, stored_scales, to_blocks
from loraq.formats.quantization import (
    all_finite,
    check_finite,
    check_input,
    quantize_with_scales,
)
from loraq.formats.scales import divisor, scale_values

MAX_ELEMENTS = 1 << 27  # float64 values of the units that are rounded together: 1 GiB


@torch.no_grad()
def round_weights(
    target_BOI: Tensor, fmt: Format, second_BII: Tensor, options: RoundingConfig
) -> list[QuantizedTensor]:
    """Q(target) of each unit in packed form, with GPTQ under the inputs' second moments.

    Inputs that are always zero take no part in the compensation. Raises LoraqError for moments of
    the wrong shape, with NaN or Inf, or not positive definite with `damp`, and for the errors of
    `quantize`.
    """
    check_input(target_BOI)
    _check_moments(second_BII, target_BOI)
    if fmt.family == "float":
        return [quantize(target_OI, fmt) for target_OI in target_BOI]
    o, i = target_BOI.shape[1:]
    step = max(1, MAX_ELEMENTS // (i * (i + o)))
    rounded: list[QuantizedTensor] = []
    for start in range(0, target_BOI.shape[0], step):
        part = slice(start, start + step)
        moments = second_BII[part].to(target_BOI.device)
        rounded += _round_batch(target_BOI[part].float(), fmt, moments, options)
    return rounded


def _round_batch(
    target_BOI: Tensor, fmt: Format, second_BII: Tensor, options: RoundingConfig
) -> list[QuantizedTensor]:
    units, rows, width = target_BOI.shape
    order_BI = _orders(second_BII, options.act_order)
    pairs = zip(second_BII, order_BI, strict=True)
    factors = upper_choleskys(pairs, options.damp)
    errors = [target_BOI.new_empty(width, rows, dtype=torch.float64) for _ in range(units)]
    scales = _Scales(target_BOI, fmt, known=options.act_order)
    length = options.block
    if scales.later:  # complete scale blocks, whose scales need up-to-date values
        length = -(-length // scales.block) * scales.block
    final_BOI = torch.empty_like(target_BOI)
    for start in range(0, width, length):
        chunk = slice(start, min(start + length, width))
        columns = [order_I[chunk] for order_I in order_BI]
        before = [t_OI[:, c].mT for t_OI, c in zip(target_BOI, columns, strict=True)]
        before_KBO = torch.stack(before, 1).double()
        now_KBO = before_KBO.clone()
        corners = [_inverse(r_II[chunk, chunk]) for r_II in factors]
        if start:
            for b, (r_II, error_IO) in enumerate(zip(factors, errors, strict=True)):
                now_KBO[:, b] += corners[b].mT @ (r_II[:start, chunk].mT @ error_IO[:start])
        rounded_KBO = _round_chunk(now_KBO, start, torch.stack(corners, -1), scales, columns)
        for b in range(units):
            errors[b][chunk] = before_KBO[:, b] - rounded_KBO[:, b]
            final_BOI[b][:, columns[b]] = now_KBO[:, b].mT.float()
    del factors, errors, now_KBO, before_KBO  # limits peak memory: packing needs as much
    scales.check_finite(target_BOI)
    # the same values and scales as in the loop, and so the same codes
    return [quantize_with_scales(final_BOI[b], fmt, *scales.unit_scales(b)) for b in range(units)]


def _round_chunk(
    now_KBO: Tensor, start: int, corner_KKB: Tensor, scales: _Scales, columns: list[Tensor]
) -> Tensor:
    """Round a chunk's columns; afterwards `now_KBO` holds each column's values before rounding."""
    feedback_KKB1 = (corner_KKB / corner_KKB.diagonal().mT[:, None])[..., None]
    scratch_KBO = torch.empty_like(now_KBO)
    rounded_KBO = torch.empty_like(now_KBO, dtype=torch.float32)
    numbers_KB = torch.stack(columns, -1) // scales.block
    unit_B = torch.arange(len(columns), device=now_KBO.device)
    round_ = scales.format.element.round_
    for k, column_BO in enumerate(now_KBO):
        if scales.known:
            at = numbers_KB[k], unit_B
            value_BO, divisor_BO = scales.value_NBO[at], scales.divisor_NBO[at]
        else:
            if start + k in scales.later:
                scales.choose_block_scale(start + k, now_KBO[k : k + scales.block])
            number = (start + k) // scales.block
            value_BO, divisor_BO = scales.value_NBO[number], scales.divisor_NBO[number]
        rounded_BO = round_(column_BO.float().div_(divisor_BO)).mul_(value_BO)
        rounded_KBO[k] = rounded_BO
        error_BO = column_BO - rounded_BO
        # two operations: a fused one may round differently at the end of a vector
        change = torch.mul(feedback_KKB1[k, k + 1 :], error_BO, out=scratch_KBO[k + 1 :])
        now_KBO[k + 1 :].sub_(change)
    return rounded_KBO


class _Scales:
    """Stored scales of a batch and their values; known in advance, or chosen block by block."""

    def __init__(self, target_BOI: Tensor, fmt: Format, known: bool) -> None:
        self.format, self.known = fmt, known
        width = target_BOI.shape[-1]
        if fmt.block == -1:
            blocks_BONK = target_BOI.flatten(1)[:, None, None]
        else:
            blocks_BONK = to_blocks(target_BOI, block_length(fmt, width))
        self.block = blocks_BONK.shape[-1]
        absmax_BON = blocks_BONK.abs().amax(-1)
        self._tensor_scales = [find_tensor_scale(absmax_ON, fmt) for absmax_ON in absmax_BON]
        self._tensor_scale = None
        if self._tensor_scales[0] is not None:
            self._tensor_scale = torch.stack(self._tensor_scales).view(len(target_BOI), -1, 1)
        self.later = range(0) if known else range(self.block, width, self.block)
        first = slice(None) if known else slice(1)
        stored = self._choose(blocks_BONK[:, :, first], absmax_BON[..., first])
        self.stored_BON = stored.repeat(1, 1, 1 + len(self.later))
        self.value_NBO = self._values(self.stored_BON)
        self.divisor_NBO = divisor(self.value_NBO)

    def choose_block_scale(self, start: int, now_KBO: Tensor) -> None:
        """Choose the scales of the block at column `start` from its current values."""
        n = start // self.block
        blocks_BONK = to_blocks(now_KBO.permute(1, 2, 0).float().contiguous(), self.block)
        stored_BON = self._choose(blocks_BONK, blocks_BONK.abs().amax(-1))
        self.stored_BON[..., n : n + 1] = stored_BON
        self.value_NBO[n : n + 1] = self._values(stored_BON)
        self.divisor_NBO[n] = divisor(self.value_NBO[n])

    def unit_scales(self, b: int) -> tuple[Tensor, Tensor | None]:
        """Stored scales and tensor scale of one unit, as its QuantizedTensor stores them."""
        stored = self.stored_BON[b].clone()
        return stored.reshape(()) if self.format.block == -1 else stored, self._tensor_scales[b]

    def check_finite(self, target_BOI: Tensor) -> None:
        """Raise LoraqError if a scale overflows its format."""
        check_finite(self.value_NBO, target_BOI, self.format)

    def _choose(self, blocks_BONK: Tensor, absmax_BON: Tensor) -> Tensor:
        return stored_scales(blocks_BONK, absmax_BON, self.format, self._tensor_scale)

    def _values(self, stored_BON: Tensor) -> Tensor:
        values_BON = scale_values(stored_BON, self.format, self._tensor_scale)
        return values_BON.permute(2, 0, 1).contiguous()


def upper_choleskys(pairs: Iterable[tuple[Tensor, Tensor]], damp: float) -> list[Tensor]:
    """`_upper_cholesky` of each (moments, order); LoraqError if one is not positive definite."""
    found = [_upper_cholesky(second_II, order_I, damp) for second_II, order_I in pairs]
    if torch.stack([failed for _, failed in found]).any():
        raise LoraqError(
            f"The inputs' second moment is not positive definite with damp={damp:g}. "
            "Raise quant.rounding.damp (0.01 is common), or capture more calibration inputs."
        )
    return [upper_II for upper_II, _ in found]


def _upper_cholesky(second_II: Tensor, order_I: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """Upper R with R·Rᵀ = H (damped), axes in the given order, float64; nonzero if that fails.

    Rows and columns of dead inputs are zero except for the damping, so that they decouple.
    """
    reverse_I = order_I.flip(0)  # with both axes reversed, R is the usual lower factor
    h_II = second_II.mT[reverse_I[:, None], reverse_I].double().mT  # column-major, for LAPACK
    diagonal_I = h_II.diagonal().clone()
    dead_I, mean = diagonal_I == 0, diagonal_I.mean()
    h_II.masked_fill_(dead_I, 0.0).masked_fill_(dead_I[:, None], 0.0)
    h_II.diagonal().add_(torch.where(mean > 0, damp * mean, 1.0))
    failed = torch.empty((), dtype=torch.int32, device=h_II.device)
    torch.linalg.cholesky_ex(h_II, out=(h_II, failed))
    return h_II.flip(0, 1), failed


def _inverse(upper_KK: Tensor) -> Tensor:
    identity_KK = torch.eye(len(upper_KK), dtype=upper_KK.dtype, device=upper_KK.device)
    return torch.linalg.solve_triangular(upper_KK, identity_KK, upper=True)


def _orders(second_BII: Tensor, act_order: bool) -> Tensor:
    """The order in which each unit's columns are rounded (B, I)."""
    diagonal_BI = second_BII.diagonal(dim1=1, dim2=2)
    if act_order:
        return diagonal_BI.argsort(descending=True, stable=True)
    return torch.arange(diagonal_BI.shape[1], device=second_BII.device).expand(diagonal_BI.shape)


def _check_moments(second_BII: Tensor, target_BOI: Tensor) -> None:
    if target_BOI.dim() != 3:
        raise LoraqError(
            f"GPTQ takes weights of shape units × out × in, not {tuple(target_BOI.shape)}. "
            "Add a leading axis for a single unit."
        )
    wanted = (target_BOI.shape[0], target_BOI.shape[2], target_BOI.shape[2])
    if tuple(second_BII.shape) != wanted:
        raise LoraqError(
            f"The inputs' second moments have the shape {tuple(second_BII.shape)}, and the weights "
            f"need {wanted}. Capture them on the inputs of these layers."
        )
    if not all_finite(target_BOI):
        raise LoraqError("Cannot round NaN or Inf. Fix the computation of the weights.")
    negative = int((second_BII.diagonal(dim1=1, dim2=2) < 0).sum())
    if negative or not all_finite(second_BII):
        bad = int((~second_BII.isfinite()).sum())
        raise LoraqError(
            f"The inputs' second moments have {bad} values that are NaN or Inf and {negative} "
            "negative values on the diagonal. Capture them again, from a model with finite outputs."
        )
