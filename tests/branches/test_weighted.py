"""Branches weighted by the inputs, rotated, split unevenly, or with gradients through Q."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from loraq.branches import find
from loraq.branches.linear_algebra import balance, root_and_inverse
from loraq.branches.rotation import rotate_factors
from loraq.config import BranchConfig
from loraq.errors import LoraqError
from tests.branches.test_branches import LQER, O2, O2_ADAM, final_error, problem, weights


def moments(batch=2, width=64, seed=3) -> torch.Tensor:
    """E[xᵀx] of correlated inputs with channels of very different sizes."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 400, width, generator=g) * torch.logspace(-1, 1, width)
    mix = torch.eye(width) + 0.2 * torch.randn(batch, width, width, generator=g) / 8
    x = x @ mix
    return x.mT @ x / 400


def weighted(w, second, **options):
    root, inverse = root_and_inverse(second)
    return replace(problem(w, **options), root_BII=root, inverse_root_BII=inverse)


def output_error(p, s, second) -> torch.Tensor:
    """√tr((W − Ŵ)H(W − Ŵ)ᵀ) of the stored solution."""
    product = p.product(s.left_BOR, s.right_BRI)
    main = p.round_main(p.weight_BOI - product if s.residual else p.weight_BOI)
    error = p.weight_BOI - main - product
    return torch.einsum("boi,bij,boj->b", error, second, error).sqrt()


def test_the_root_is_the_symmetric_square_root():
    second = moments()
    root, inverse = root_and_inverse(second)
    assert torch.allclose(root @ root, second, rtol=1e-3, atol=1e-3)
    assert torch.allclose(root @ inverse, torch.eye(64).expand(2, 64, 64), atol=1e-3)


def test_qera_is_the_best_rank_r_correction_under_h():
    """Its error is the tail of the singular values of (W − Q(W))·S (Eckart–Young)."""
    w, second = weights(), moments()
    p = weighted(w, second, branch="fp16")
    s = find(p, BranchConfig(kind="svd", objective="compensate", start="error", weighting="full"))
    singular = torch.linalg.svdvals(p.weighted(w - p.round_main(w)).double())
    tail = singular[:, p.rank :].square().sum(1).sqrt().float()
    assert torch.allclose(output_error(p, s, second), tail, rtol=5e-3)
    plain = find(problem(w, branch="fp16"), LQER)
    assert (output_error(p, s, second) < output_error(p, plain, second)).all()


def test_alternation_under_h_lowers_the_output_error():
    w, second = weights(), moments()
    p = weighted(w, second)
    under_h = find(p, replace(O2, weighting="full"))
    without = find(problem(w), O2)
    assert (output_error(p, under_h, second) < output_error(p, without, second)).all()
    assert (final_error(problem(w), without) < final_error(problem(w), under_h)).all()
    reached = p.relative_error(
        p.round_main(w - p.product(under_h.left_BOR, under_h.right_BRI))
        + p.product(under_h.left_BOR, under_h.right_BRI)
    )
    assert reached.mean().item() == pytest.approx(min(under_h.losses), rel=1e-2)


@pytest.mark.parametrize("kind", ["random", "learned"])
def test_a_rotation_keeps_the_product(kind):
    p = problem(weights(), rank=16, branch="int4")
    g = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 48, 16, generator=g), torch.randn(2, 16, 64, generator=g)
    left = left * torch.linspace(4, 0.1, 16)
    turned = rotate_factors(p, left, right, kind)
    assert torch.allclose(turned[0] @ turned[1], left @ right, atol=1e-4)


def test_a_learned_rotation_is_at_least_as_good_as_the_random_one_it_starts_from():
    g = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 48, 16, generator=g), torch.randn(2, 16, 64, generator=g)
    errors = {}
    for kind in ("random", "learned"):
        p = problem(weights(), rank=16, branch="int4")  # fresh generators: the same random start
        product = p.product(*rotate_factors(p, left, right, kind))
        errors[kind] = (left @ right - product).flatten(1).norm(dim=1)
    assert (errors["learned"] <= errors["random"]).all()
    assert (errors["learned"] < errors["random"]).any()


@pytest.mark.parametrize("split", [0.0, 0.3, 1.0])
def test_a_split_shares_each_terms_size_and_keeps_the_product(split):
    g = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 48, 8, generator=g), torch.randn(2, 8, 64, generator=g)
    size = left.norm(dim=1) * right.norm(dim=2)
    a, b = balance(left, right, split)
    assert torch.allclose(a @ b, left @ right, atol=1e-4)
    assert torch.allclose(a.norm(dim=1), size**split, rtol=1e-3)
    assert torch.allclose(b.norm(dim=2), size ** (1 - split), rtol=1e-3)
    s = find(problem(weights()), BranchConfig(kind="svd", split=split))
    ratio = s.left_BOR.norm(dim=1).log() / (s.left_BOR.norm(dim=1) * s.right_BRI.norm(dim=2)).log()
    assert torch.allclose(ratio, torch.full_like(ratio, split), atol=1e-3)


def grid_step(w_BOI: torch.Tensor) -> torch.Tensor:
    """int4 in one group of 64: absmax / 7."""
    return (w_BOI.abs().amax(-1, keepdim=True) / 7).expand_as(w_BOI)


def test_the_soft_gradient_differs_from_stop():
    p = replace(problem(weights()), step_main=grid_step)
    soft = find(p, replace(O2_ADAM, gradient="soft"))
    stop = find(problem(weights()), O2_ADAM)
    assert soft.losses[0] == stop.losses[0] and soft.losses[1:3] != stop.losses[1:3]
    with pytest.raises(LoraqError, match="uniform grid"):
        find(problem(weights()), replace(O2_ADAM, gradient="soft"))


def test_the_soft_slope_is_one_on_average():
    """s′ integrates to 1 over a cell, so that the soft rounding is no damping in disguise."""
    from loraq.branches.loraq import SHARPNESS

    r = torch.linspace(-0.5, 0.5, 10_001)
    slope = 0.5 * SHARPNESS / math.tanh(SHARPNESS / 2) / torch.cosh(SHARPNESS * r).square()
    assert slope.mean().item() == pytest.approx(1, abs=1e-3)
