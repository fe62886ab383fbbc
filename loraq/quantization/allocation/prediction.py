"""Predict the output error of each option from the weight's singular values.

For white inputs x, singular values σ of the unit's weight normalised to Σσ² = 1, and a branch along
the weight's leading singular vectors (objective=shape, start=weight):

    head = Σ_{j≤r} σ_j²    left = Σ_{j>r} σ_j² + 2·δ_b·head       left: rounded by the main weight
    e²   = (δ_a + δ_w·(1 − g))·left + passes·δ_ba·head            e² = ‖Y − Ŷ‖² / ‖Y‖²

g = 0 for one SVD. Factors that are also fitted to the rounding error (kind=alternating, loraq)
remove the fraction f of this nearly white error, reduced by the factors' own rounding error:

    g    = f(r) · δ_w·left / (δ_w·left + 2·δ_b·head)

with f(r) the energy fraction of the largest r singular values under the Marchenko–Pastur law. A
branch fitted to the error E = W − Q(W) alone (objective=compensate; start=error or zero) removes f
of E, and none of the activations' error:

    e²   = δ_a + δ_w·(1 − f + 2·δ_b·f + passes·δ_ba·f)

δ are the formats' relative squared errors on Gaussian values, measured once: of the main weight (w)
and activation (a), of a branch factor (b; there are two), of its activation (ba; `passes` is 2 if
the intermediate is requantised). Errors are assumed independent. A rotation does not change σ; the
effects of smoothing and GPTQ are ignored for every option. Measured errors are within 25 % of this
(tests); fitted factors with a rank above a quarter of the width are the least accurate.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from loraq.config import Recipe
from loraq.formats import Format, fake_quantize

SAMPLE_VALUES = 1 << 18
"""Gaussian values in the sample of `gaussian_error`: accurate to about 1 %."""


@functools.lru_cache(maxsize=256)
def gaussian_error(fmt: Format, length: int) -> float:
    """δ = ‖Q(x) − x‖² / ‖x‖² of Gaussian rows of `length` values, on a seeded sample."""
    generator = torch.Generator().manual_seed(0)
    rows = max(1, SAMPLE_VALUES // length)
    x_TI = torch.randn(rows, length, generator=generator)
    error_TI = fake_quantize(x_TI, fmt) - x_TI
    return (error_TI.double().square().sum() / x_TI.double().square().sum()).item()


def energy_spectrum(w_OI: Tensor) -> np.ndarray:
    """σ_j² / Σσ² in descending order, float64 (min(O, I),); zeros for a zero weight.

    From the eigenvalues of the smaller Gram matrix, which take a fraction of an SVD's time.
    """
    w = w_OI.double()
    gram = w @ w.mT if w.shape[0] < w.shape[1] else w.mT @ w
    energy = torch.linalg.eigvalsh(gram).flip(-1).clamp_min(0).cpu().numpy()
    total = energy.sum()
    return energy / total if total > 0 else energy


def white_energy_fraction(shape: tuple[int, int], ranks: Sequence[int]) -> np.ndarray:
    """f(r): fraction of Σσ² in the largest r singular values of a large white matrix (len(ranks),).

    Marchenko–Pastur: with λ = 1 + β + 2√β·cos θ and β = min/max of the shape, the density of σ²
    over θ is ∝ sin²θ / λ and that of their sum ∝ sin²θ; θ = 0 is the largest.
    """
    least, most = sorted(shape)
    beta = least / most
    edges = np.linspace(0, np.pi, 4097)
    middle = (edges[1:] + edges[:-1]) / 2
    number = np.sin(middle) ** 2 / (1 + beta + 2 * np.sqrt(beta) * np.cos(middle))
    number = np.concatenate([[0.0], np.cumsum(number) / number.sum()])
    energy = (edges - np.sin(edges) * np.cos(edges)) / np.pi
    return np.interp(np.asarray(ranks) / least, number, energy)


def predicted_error(
    energy_K: np.ndarray,
    shape: tuple[int, int],
    ranks: Sequence[int],
    formats: Mapping[str, Format],
    recipe: Recipe,
) -> np.ndarray:
    """e² of one unit at each of `ranks` (len(ranks),): squared relative error of its output.

    energy_K: `energy_spectrum` of the unit's weight; shape: its (ΣO, I).
    """
    names = ("weight", "activation", "branch_weight", "branch_activation")
    weight, activation, factor, branch = (gaussian_error(formats[n], shape[1]) for n in names)
    passes = 1 + recipe.requantize_intermediate
    fraction = white_energy_fraction(shape, ranks)
    if not energy_K.any():
        return np.zeros(len(ranks))
    if recipe.branch.objective == "compensate" or recipe.branch.start != "weight":
        return activation + weight * (1 - fraction * (1 - 2 * factor - passes * branch))
    head = np.concatenate([[0.0], np.cumsum(energy_K)])[np.asarray(ranks)]
    left = (1 - head).clip(0) + 2 * factor * head
    if recipe.branch.kind == "svd":
        fraction = np.zeros(len(ranks))
    noise = weight * left + 2 * factor * head
    gain = fraction * weight * left / np.maximum(noise, 1e-300)
    return (activation + weight * (1 - gain)) * left + passes * branch * head
