"""Rate–distortion references: how small ‖W − Ŵ‖_F / ‖W‖_F can be at R stored bits per weight.

    memoryless Gaussian   D(R) = σ² · 2^(−2R)                     Cover & Thomas, theorem 10.3.2
    Gaussian vector       R = mean_k max(0, ½ log2(λ_k / θ)), D = Σ_k min(θ, λ_k)         10.3.3
    Shannon lower bound   D(R) ≥ 2^(2(h − R)) / (2πe)             h: differential entropy in bits

Each holds for a *model* of the weights, and R counts everything that is stored: codes, scales and
low-rank factors. None reads activations, so they do not bound the output error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from loraq.errors import LoraqError

MIN_WEIGHTS = 256
"""Minimum draws for the entropy estimate (0.04 nat low at 256)."""

BISECTIONS = 80
"""Bisections of log2 θ: enough to reduce an interval of 10⁴ bits to float64's precision."""


def gaussian_limit(w_OI: Tensor, bits: float) -> float:
    """2^(−R): √(D/σ²) of D(R) = σ²·2^(−2R), weights as independent Gaussians N(0, σ²).

    σ² is the second moment ‖W‖²_F / (O·I) (zero mean is assumed), so it cancels in the relative
    error. The Gaussian is the hardest memoryless source of a given second moment: long codes reach
    this value for every marginal. It therefore does NOT bound weights with a peaked marginal
    (Laplacian: `shannon_limit`), nor dependent weights, which a low-rank branch exploits
    (`spectral_limit`). Raises LoraqError if W is zero or not finite, or bits < 0.
    """
    _checked_weight(w_OI, bits)
    return 2.0 ** (-bits)


def spectral_limit(w_OI: Tensor, bits: float) -> float:
    """√(D/Σλ) of reverse water-filling: R = mean_k max(0, ½ log2(λ_k/θ)), D = Σ_k min(θ, λ_k).

    λ_k are the eigenvalues of WᵀW/O, with rows as draws of a Gaussian vector; a wide matrix uses
    its columns (WWᵀ/I), so that there are at least as many draws as dimensions. θ is found by
    bisection on its logarithm, in float64.

    The reference is optimistic, because the decoder knows the covariance at no rate: for n draws
    of length k = n of independent Gaussians, which have no structure to exploit, the value is
    e^(−½)·2^(−R) at high rates (Marchenko–Pastur). It does NOT bound weights whose coefficients
    are easier to code than Gaussian ones (peaked or clustered). Raises LoraqError as
    `gaussian_limit`.
    """
    w = _checked_weight(w_OI, bits)
    gram_KK = w @ w.T if w.shape[0] < w.shape[1] else w.T @ w
    eigenvalues_K = torch.linalg.eigvalsh(gram_KK).clamp_min(0)
    total = eigenvalues_K.sum()
    energy_K = eigenvalues_K[eigenvalues_K > 0] / total  # a zero eigenvalue takes no bits
    level = 2.0 ** _log_water_level(energy_K.log2(), bits * len(eigenvalues_K))
    return math.sqrt(energy_K.clamp_max(level).sum().item())


def shannon_limit(w_OI: Tensor, bits: float) -> float:
    """√D of D ≥ 2^(2(h−R))/(2πe), h the differential entropy of the weights over their rms.

    Weights are independent draws of any one marginal. The bound is tight at high rates; at R → 0
    it is √(entropy power / second moment) ≤ 1. h is Vasicek's estimate, spacings of 2m = 2√n
    sorted values: one sort, so millions of weights take a second. It is within 0.01 nat (1 % of
    the value) for at least 36,864 Gaussian, Laplacian, t₅ or uniform draws. Of scipy's other
    estimators, Ebrahimi's is larger by a constant and overestimates h there, which a lower bound
    must not; van Es' is 0.01–0.03 nat low, and its one-sided spacings are 0 for equal bfloat16
    weights; Correa's takes 100 times as long. h is capped at the Gaussian's, the maximum.

    It does NOT bound codes that use dependence between weights: a low-rank branch can be lower. It
    is 0, and so uninformative, if one value occurs more than 2√n times (ternary or pruned
    weights). Raises LoraqError as `gaussian_limit`, and below 256 weights.
    """
    import numpy as np
    from scipy.stats import differential_entropy

    w = _checked_weight(w_OI, bits)
    if w.numel() < MIN_WEIGHTS:
        raise LoraqError(
            f"{w.numel()} weights are too few to estimate an entropy: at least "
            f"{MIN_WEIGHTS} are needed. Leave the layer out."
        )
    values = (w / w.square().mean().sqrt()).flatten().numpy()
    with np.errstate(divide="ignore"):  # a spacing of 0: h = −∞, the limit is 0
        entropy = float(differential_entropy(values, method="vasicek"))
    excess = min(entropy - 0.5 * math.log(2 * math.pi * math.e), 0.0)  # nats below the Gaussian's
    return math.exp(excess) * 2.0 ** (-bits)


def mean_limits(weights: Mapping[str, Tensor], bits: float) -> dict[str, float]:
    """The mean over layers of each reference: gaussian, spectral, shannon.

    weights: layer name → (O, I). Every layer gets the same `bits`; the mean does not bound a method
    that gives its layers different rates.
    """
    if not weights:
        raise LoraqError("Limits of 0 layers have no mean. Pass at least 1 weight matrix.")
    references = {"gaussian": gaussian_limit, "spectral": spectral_limit, "shannon": shannon_limit}
    return {
        name: sum(limit(w_OI, bits) for w_OI in weights.values()) / len(weights)
        for name, limit in references.items()
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


def _checked_weight(w_OI: Tensor, bits: float) -> Tensor:
    """W in float64 on the CPU; LoraqError if the relative error or the rate is undefined."""
    if not (math.isfinite(bits) and bits >= 0):
        raise LoraqError(f"bits={bits} is not a rate. Pass 0 or more stored bits per weight.")
    if w_OI.dim() != 2 or w_OI.numel() == 0:
        raise LoraqError(
            f"A weight of shape {tuple(w_OI.shape)} is not a matrix. Pass (out, in), both ≥ 1."
        )
    w = w_OI.detach().cpu().double()
    if not w.isfinite().all():
        bad = int((~w.isfinite()).sum())
        raise LoraqError(
            f"{bad} of {w.numel()} weights are not finite. Fix the model that contains them."
        )
    if not w.any():
        raise LoraqError(
            f"All {w.numel()} weights are 0, so a relative error is undefined. Leave the layer out."
        )
    return w
