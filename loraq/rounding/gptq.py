"""GPTQ: columns are rounded one by one, and each column's error is made up for by those to come.

    H = E[x̃ᵀx̃] + damp · mean(diag E[x̃ᵀx̃]) · I,    H⁻¹ = Uᵀ·U, U upper,
    q_i = round(w_i),    w_j -= (w_i − q_i) · U_ij / U_ii  for every j > i

(Frantar et al., arXiv 2210.17323, algorithm 1). Columns are taken in chunks S. With H = R·Rᵀ, R
upper, so that U = R⁻¹, what a chunk has received from all columns before it (< S) is

    w_S + (W − Q)_<S · R_<S,S · U_SS,    U_SS = (R_SS)⁻¹

in one product, with the original W: H is factored once and never inverted, but for the chunks'
own small corners.

A block's scale is what its format chooses from the block's values at the moment its first column
is reached; in the order of falling activation energy a block's columns lie apart, and all scales
come from the target.

Letters: B units, O out, I in, K columns of a chunk, N scale blocks of a row. The maths is float64
with the column first, so that a column lies in one piece; every product is made unit by unit, on
memory of its own, so that a unit's bits do not depend on its neighbours.
"""

from __future__ import annotations

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

MAX_ELEMENTS = 1 << 27  # float64 numbers that the units rounded together may take: 1 GiB


@torch.no_grad()
def round_weights(
    target_BOI: Tensor, fmt: Format, second_BII: Tensor, options: RoundingConfig
) -> list[QuantizedTensor]:
    """Q(target) of each unit in packed form, after GPTQ under the inputs' second moments.

    Inputs that are always zero get no feedback and give none. Raises LoraqError for a moment of
    the wrong shape, with NaN or Inf, or that `damp` does not make positive definite, and where
    `quantize` would.
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
    factors = [factor(second_II, order_I, options.damp) for second_II, order_I in pairs]
    errors = [target_BOI.new_empty(width, rows, dtype=torch.float64) for _ in range(units)]
    scales = _Scales(target_BOI, fmt, known=options.act_order)
    length = options.block
    if scales.later:  # whole scale blocks: their values must be up to date when they are reached
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
    del factors, errors, now_KBO, before_KBO  # packing takes as much memory
    scales.check(target_BOI)
    # the same values under the same scales round to what the loop rounded them to
    return [quantize_with_scales(final_BOI[b], fmt, *scales.of_unit(b)) for b in range(units)]


def _round_chunk(
    now_KBO: Tensor, start: int, corner_KKB: Tensor, scales: _Scales, columns: list[Tensor]
) -> Tensor:
    """Round a chunk's columns in turn; `now_KBO` keeps each as it was when its turn came."""
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
                scales.find(start + k, now_KBO[k : k + scales.block])
            number = (start + k) // scales.block
            value_BO, divisor_BO = scales.value_NBO[number], scales.divisor_NBO[number]
        rounded_BO = round_(column_BO.float().div_(divisor_BO)).mul_(value_BO)
        rounded_KBO[k] = rounded_BO
        error_BO = column_BO - rounded_BO
        # two steps, for one fused step may round differently at a vector's end
        change = torch.mul(feedback_KKB1[k, k + 1 :], error_BO, out=scratch_KBO[k + 1 :])
        now_KBO[k + 1 :].sub_(change)
    return rounded_KBO


class _Scales:
    """The stored scales of a batch, known from the target or found on the way, and their values."""

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

    def find(self, start: int, now_KBO: Tensor) -> None:
        """Choose the scales of the block whose first column is `start` from its values now."""
        n = start // self.block
        blocks_BONK = to_blocks(now_KBO.permute(1, 2, 0).float().contiguous(), self.block)
        stored_BON = self._choose(blocks_BONK, blocks_BONK.abs().amax(-1))
        self.stored_BON[..., n : n + 1] = stored_BON
        self.value_NBO[n : n + 1] = self._values(stored_BON)
        self.divisor_NBO[n] = divisor(self.value_NBO[n])

    def of_unit(self, b: int) -> tuple[Tensor, Tensor | None]:
        """Stored scales and tensor scale of one unit, as its own QuantizedTensor holds them."""
        stored = self.stored_BON[b].clone()
        return stored.reshape(()) if self.format.block == -1 else stored, self._tensor_scales[b]

    def check(self, target_BOI: Tensor) -> None:
        """LoraqError for scales that their format cannot hold."""
        check_finite(self.value_NBO, target_BOI, self.format)

    def _choose(self, blocks_BONK: Tensor, absmax_BON: Tensor) -> Tensor:
        return stored_scales(blocks_BONK, absmax_BON, self.format, self._tensor_scale)

    def _values(self, stored_BON: Tensor) -> Tensor:
        values_BON = scale_values(stored_BON, self.format, self._tensor_scale)
        return values_BON.permute(2, 0, 1).contiguous()


def factor(second_II: Tensor, order_I: Tensor, damp: float) -> Tensor:
    """R, upper, float64, with R·Rᵀ = H damped and its axes in the order given.

    Rows and columns of dead inputs are zero but for the damping, so that they stay by themselves.
    """
    reverse_I = order_I.flip(0)  # both axes reversed, R is the usual lower factor
    h_II = second_II.mT[reverse_I[:, None], reverse_I].double().mT  # as LAPACK wants it: in place
    diagonal_I = h_II.diagonal().clone()
    dead_I, mean = diagonal_I == 0, diagonal_I.mean()
    h_II.masked_fill_(dead_I, 0.0).masked_fill_(dead_I[:, None], 0.0)
    h_II.diagonal().add_(torch.where(mean > 0, damp * mean, 1.0))
    failed = torch.empty((), dtype=torch.int32, device=h_II.device)
    torch.linalg.cholesky_ex(h_II, out=(h_II, failed))
    if failed:
        raise LoraqError(
            f"The inputs' second moment is not positive definite with damp={damp:g}. "
            "Raise quant.rounding.damp (0.01 is common), or capture more calibration inputs."
        )
    return h_II.flip(0, 1)


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
            f"GPTQ takes units × out × in, and the target is {tuple(target_BOI.shape)}. "
            "Add a leading axis for a single unit."
        )
    wanted = (target_BOI.shape[0], target_BOI.shape[2], target_BOI.shape[2])
    if tuple(second_BII.shape) != wanted:
        raise LoraqError(
            f"The inputs' second moments are {tuple(second_BII.shape)}, and the weights need "
            f"{wanted}. Capture them on the inputs of these very layers."
        )
    if not all_finite(target_BOI):
        raise LoraqError("Cannot round NaN or Inf. Repair what made the weights.")
    negative = int((second_BII.diagonal(dim1=1, dim2=2) < 0).sum())
    if negative or not all_finite(second_BII):
        bad = int((~second_BII.isfinite()).sum())
        raise LoraqError(
            f"The inputs' second moments have {bad} values that are NaN or Inf and {negative} "
            "negative ones on the diagonal; there may be none. Capture them again from a model "
            "that gives finite outputs."
        )
