"""Smoothing scales: x → x / s, W → W · s, per input channel (SmoothQuant, arXiv 2211.10438).

SVDQuant compares 39 candidates s = xmax^α / wmax^β by the layer's output error: the identity,
19 × (α, 0) and 19 × (α, 1 − α), α = 0.05 … 0.95 (deepcompressor, commit 69f3473).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

DAMP = 1e-3
"""Relative damping of the input energies in `balanced_scale`."""
ALPHAS = tuple(i / 20 for i in range(1, 20))


def candidates() -> list[tuple[float, float]]:
    """The grid of exponents (α, β); the first is the identity (0, 0)."""
    return [(0.0, 0.0), *((a, 0.0) for a in ALPHAS), *((a, 1.0 - a) for a in ALPHAS)]


def smoothing_scale(xmax_I: Tensor, wmax_I: Tensor, alpha: float, beta: float) -> Tensor:
    """s = xmax^α / wmax^β, rounded to bfloat16 (the stored dtype), as float32.

    Any leading batch axes. s = 1 for a channel whose x or W is zero throughout, where the formula
    gives 0 or ∞.
    """
    dead = (xmax_I <= 0) | (wmax_I <= 0)
    s = xmax_I.clamp_min(1e-12).pow(alpha) / wmax_I.clamp_min(1e-12).pow(beta)
    s = torch.where(dead, torch.ones_like(s), s)
    return s.to(torch.bfloat16).float()


def balanced_scale(rms_I: Tensor, w_OI: Tensor) -> Tensor:
    """s = √(rms(x) / ‖w‖) per input channel, rounded to bfloat16, as float32.

    After a rotation, a block's rounding errors have an energy ∝ Σ x²/s² in x and ∝ Σ s²‖w‖² in W,
    and each is multiplied by the other operand: this s minimises the product of the two, to
    (Σ |x|·‖w‖)² (Cauchy–Schwarz). s has a geometric mean of 1. Channels without x or W keep s = 1.
    DAMP times the mean energy is added to that of x, because a channel that is zero in calibration
    may be nonzero later.
    """
    norm_I = w_OI.norm(dim=-2)
    dead = (rms_I <= 0) | (norm_I <= 0)
    rms_I = (rms_I.square() + DAMP * rms_I.square().mean(-1, keepdim=True)).sqrt()
    log_I = 0.5 * (rms_I.clamp_min(1e-30).log() - norm_I.clamp_min(1e-30).log())
    log_I = torch.where(dead, torch.zeros_like(log_I), log_I)
    s = (log_I - log_I.mean(-1, keepdim=True)).exp()
    return torch.where(dead, torch.ones_like(s), s).to(torch.bfloat16).float()


def grid(x_BTI: Tensor, w_BOI: Tensor) -> Iterator[tuple[tuple[float, float], Tensor]]:
    """Yield ((α, β), s_BI) for every candidate of the grid."""
    xmax_BI, wmax_BI = x_BTI.abs().amax(-2), w_BOI.abs().amax(-2)
    for alpha, beta in candidates():
        yield (alpha, beta), smoothing_scale(xmax_BI, wmax_BI, alpha, beta)
