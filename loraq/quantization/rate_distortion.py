"""Rate–distortion references: how small ‖W − Ŵ‖_F / ‖W‖_F can get at R stored bits per weight.

    memoryless Gaussian   D(R) = σ² · 2^(−2R)                     Cover & Thomas, theorem 10.3.2
    Gaussian vector       R = mean_k max(0, ½ log2(λ_k / θ)), D = Σ_k min(θ, λ_k)         10.3.3
    Shannon lower bound   D(R) ≥ 2^(2(h − R)) / (2πe)             h: differential entropy in bits

Each is a statement about a *model* of the weights, and R counts everything that is stored: codes,
scales and low-rank factors. None of them sees activations: the output error has no limit here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from loraq.errors import LoraqError

FEWEST_WEIGHTS = 256
"""Below this many draws the entropy estimate says little (0.04 nat low at 256)."""

BISECTIONS = 80
"""Halvings of the water level's logarithm: an interval of 10⁴ bits shrinks to float64's last."""


def gaussian_limit(w_OI: Tensor, bits: float) -> float:
    """2^(−R): √(D/σ²) of D(R) = σ²·2^(−2R), weights as independent Gaussians N(0, σ²).

    σ² is the second moment ‖W‖²_F / (O·I) (mean zero is assumed), so it cancels in the relative
    error. The Gaussian is the hardest memoryless source of its second moment: long codes reach this
    value for every marginal. It therefore does NOT bound weights of a peaked marginal (Laplacian:
    `shannon_limit`), nor weights that depend on each other, which a low-rank branch exploits
    (`spectral_limit`). LoraqError where W has no energy or is not finite, or bits < 0.
    """
    _checked(w_OI, bits)
    return 2.0 ** (-bits)


def spectral_limit(w_OI: Tensor, bits: float) -> float:
    """√(D/Σλ) of reverse water-filling: R = mean_k max(0, ½ log2(λ_k/θ)), D = Σ_k min(θ, λ_k).

    λ_k are the eigenvalues of WᵀW/O, rows as draws of a Gaussian vector; a wide matrix is taken by
    its columns (WWᵀ/I), so that the draws are never fewer than the vector is long. θ is found by
    bisection on its logarithm, in float64.

    The decoder is told the covariance for free, and from n draws of length k that is much: for
    independent Gaussians, k = n, the value falls e^(−½) below 2^(−R) at high rates
    (Marchenko–Pastur), though nothing there can be exploited. So it is an optimistic reference. It
    does NOT bound weights whose coefficients are less than Gaussian (peaked or clustered ones can
    be coded better). LoraqError as `gaussian_limit`.
    """
    w = _checked(w_OI, bits)
    gram_KK = w @ w.T if w.shape[0] < w.shape[1] else w.T @ w
    eigenvalues_K = torch.linalg.eigvalsh(gram_KK).clamp_min(0)
    total = eigenvalues_K.sum()
    energy_K = eigenvalues_K[eigenvalues_K > 0] / total  # an empty direction takes no bits
    level = 2.0 ** _log_water_level(energy_K.log2(), bits * len(eigenvalues_K))
    return math.sqrt(energy_K.clamp_max(level).sum().item())


def shannon_limit(w_OI: Tensor, bits: float) -> float:
    """√D of D ≥ 2^(2(h−R))/(2πe), h the differential entropy of the weights over their rms.

    Weights as independent draws of one marginal, whatever it is; at high rates the bound is tight,
    at R → 0 it gives √(entropy power / second moment) ≤ 1. h is Vasicek's estimate, spacings of
    2m = 2√n sorted values: one sort, so millions of weights take a second; within 0.01 nat (1 % of
    the value) from 36,864 weights on for Gaussian, Laplacian, t₅ and uniform draws. Of scipy's
    other estimators Ebrahimi's, larger by a constant, overstates h there, which a lower bound must
    not; van Es' is 0.01–0.03 nat low and its one-sided spacings vanish where bfloat16 weights
    coincide; Correa's takes 100 times as long. h is capped at the Gaussian's, the largest there is.

    It does NOT bound codes that use dependence between weights: a low-rank branch may go below.
    Nor does it say anything of weights that more than 2√n times take one same value (ternary or
    pruned ones): there it is 0. LoraqError as `gaussian_limit`.
    """
    import numpy as np
    from scipy.stats import differential_entropy

    w = _checked(w_OI, bits)
    if w.numel() < FEWEST_WEIGHTS:
        raise LoraqError(
            f"{w.numel()} weights are too few to estimate an entropy from: at least "
            f"{FEWEST_WEIGHTS} are needed. Leave the layer out."
        )
    values = (w / w.square().mean().sqrt()).flatten().numpy()
    with np.errstate(divide="ignore"):  # log 0 where a spacing vanishes: h = −∞, the limit 0
        entropy = float(differential_entropy(values, method="vasicek"))
    excess = min(entropy - 0.5 * math.log(2 * math.pi * math.e), 0.0)  # nats from the Gaussian's
    return math.exp(excess) * 2.0 ** (-bits)


def limits(weights: Mapping[str, Tensor], bits: float) -> dict[str, float]:
    """Mean over the layers, by name (O, I), of each reference: gaussian, spectral, shannon.

    Every layer gets the same `bits`; the mean of equal-rate limits is no limit of a method that
    gives its layers different rates.
    """
    if not weights:
        raise LoraqError("limits of 0 layers have no mean. Pass at least 1 weight matrix.")
    found = {"gaussian": gaussian_limit, "spectral": spectral_limit, "shannon": shannon_limit}
    return {
        name: sum(limit(w_OI, bits) for w_OI in weights.values()) / len(weights)
        for name, limit in found.items()
    }


def _log_water_level(log_energy_K: Tensor, total_bits: float) -> float:
    """log2 θ with Σ_k max(0, ½(log2 λ_k − log2 θ)) = total_bits."""
    high = log_energy_K.max().item()  # no bits at all
    low = log_energy_K.min().item() - 2 * total_bits / len(log_energy_K)  # at least total_bits
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        spent = (log_energy_K - middle).clamp_min(0).sum().item() / 2
        low, high = (middle, high) if spent > total_bits else (low, middle)
    return high


def _checked(w_OI: Tensor, bits: float) -> Tensor:
    """W in float64 on the CPU; LoraqError where no relative error or rate is defined."""
    if not (math.isfinite(bits) and bits >= 0):
        raise LoraqError(f"bits={bits} is no rate. Give 0 or more stored bits per weight.")
    if w_OI.dim() != 2 or w_OI.numel() == 0:
        raise LoraqError(
            f"A weight of shape {tuple(w_OI.shape)} is no matrix. Pass (out, in), both at least 1."
        )
    w = w_OI.detach().cpu().double()
    if not w.isfinite().all():
        bad = int((~w.isfinite()).sum())
        raise LoraqError(f"{bad} of {w.numel()} weights are not finite. Repair what made them.")
    if not w.any():
        raise LoraqError(
            f"All {w.numel()} weights are 0: a relative error has no meaning there. Leave the "
            "layer out."
        )
    return w
