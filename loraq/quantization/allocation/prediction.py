"""What an option is predicted to cost in accuracy, from the weight's spectrum alone.

With white inputs x and singular values σ of the unit's weight, shares of Σσ² and the branch at the
weight's own directions (objective=shape, start=weight):

    head = Σ_{j≤r} σ_j²    left = Σ_{j>r} σ_j² + 2·δ_b·head       what main still rounds
    e²   = (δ_a + δ_w·(1 − g))·left + passes·δ_ba·head            of ‖Y − Ŷ‖² / ‖Y‖²

g = 0 for one SVD. Factors fitted to the rounding as well (kind=alternating, loraq) take the share f
of its nearly white error, as far as it stands out of the factors' own:

    g    = f(r) · δ_w·left / (δ_w·left + 2·δ_b·head)

with f(r) the share that the Marchenko–Pastur law gives the largest r singular values. A branch that
follows the error E = W − Q(W) alone (objective=compensate; start=error or zero) takes f of that,
and nothing of the activations' error:

    e²   = δ_a + δ_w·(1 − f + 2·δ_b·f + passes·δ_ba·f)

δ are the formats' relative squared errors on Gaussian values, measured once: of the main weight (w)
and activation (a), a factor of the branch (b; there are two), its activation (ba; `passes` is 2
where the intermediate is quantised again). Errors count as independent. A rotation leaves σ as it
is; what smoothing and GPTQ change is left out, alike for every option. Measured errors lie within a
quarter of this (tests); least certain are fitted factors of a rank above a quarter of the width.
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
"""Gaussian values that a format's error is measured on: good to about 1 %."""


@functools.lru_cache(maxsize=256)
def gaussian_error(fmt: Format, length: int) -> float:
    """δ = ‖Q(x) − x‖² / ‖x‖² of Gaussian rows of `length` values, from a seeded sample."""
    generator = torch.Generator().manual_seed(0)
    rows = max(1, SAMPLE_VALUES // length)
    x_TI = torch.randn(rows, length, generator=generator)
    error_TI = fake_quantize(x_TI, fmt) - x_TI
    return (error_TI.double().square().sum() / x_TI.double().square().sum()).item()


def spectrum(w_OI: Tensor) -> np.ndarray:
    """Shares σ_j² / Σσ² in falling order, float64 (min(O, I),); zeros for a weight of zeros.

    Eigenvalues of the shorter side's Gram matrix: sums of σ² need no more, at a fraction of an
    SVD's time.
    """
    w = w_OI.double()
    gram = w @ w.mT if w.shape[0] < w.shape[1] else w.mT @ w
    energy = torch.linalg.eigvalsh(gram).flip(-1).clamp_min(0).cpu().numpy()
    total = energy.sum()
    return energy / total if total > 0 else energy


def white_share(shape: tuple[int, int], ranks: Sequence[int]) -> np.ndarray:
    """f(r): share of Σσ² in the largest r singular values of a large white matrix (len(ranks),).

    Marchenko–Pastur: with λ = 1 + β + 2√β·cos θ and β = min/max of the shape, numbers of σ² lie as
    sin²θ / λ over θ and their sum as sin²θ, θ from 0 at the largest.
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

    energy_K: `spectrum` of the unit's weight; shape: its (ΣO, I).
    """
    names = ("weight", "activation", "branch_weight", "branch_activation")
    weight, activation, factor, branch = (gaussian_error(formats[n], shape[1]) for n in names)
    passes, taken = 1 + recipe.requantize_intermediate, white_share(shape, ranks)
    if not energy_K.any():
        return np.zeros(len(ranks))
    if recipe.branch.objective == "compensate" or recipe.branch.start != "weight":
        return activation + weight * (1 - taken * (1 - 2 * factor - passes * branch))
    head = np.concatenate([[0.0], np.cumsum(energy_K)])[np.asarray(ranks)]
    left = (1 - head).clip(0) + 2 * factor * head
    if recipe.branch.kind == "svd":
        taken = 0.0
    noise = weight * left + 2 * factor * head
    gain = taken * weight * left / np.maximum(noise, 1e-300)
    return (activation + weight * (1 - gain)) * left + passes * branch * head
