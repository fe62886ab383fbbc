"""Finders against linear algebra and their definitions."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from loraq.branches import alternating, find, linear_algebra
from loraq.branches.linear_algebra import (
    balance,
    first_image,
    random_rotation,
    solve_left,
    solve_right,
    tracked_svd,
    truncated_svd,
)
from loraq.branches.problem import Problem, Solution
from loraq.config import BranchConfig
from loraq.errors import LoraqError
from loraq.formats import fake_quantize, get_format


def weights(batch=2, out=48, width=64, seed=0) -> torch.Tensor:
    """Heavy-tailed weights with a decaying spectrum, as trained layers have."""
    g = torch.Generator().manual_seed(seed)
    u, v = torch.randn(batch, out, 16, generator=g), torch.randn(batch, 16, width, generator=g)
    spectrum = torch.linspace(2, 0.2, 16)
    return (u * spectrum) @ v / 8 + 0.3 * torch.randn(batch, out, width, generator=g)


def problem(w: torch.Tensor, rank=8, main="int4", branch="int8", output_error=None) -> Problem:
    main_format, branch_format = get_format(main), get_format(branch)
    return Problem(
        w,
        rank,
        lambda t: fake_quantize(t, main_format),
        lambda t: fake_quantize(t, branch_format),
        [torch.Generator().manual_seed(1) for _ in w],
        output_error,
    )


def final_error(p: Problem, s: Solution) -> torch.Tensor:
    """‖W − Ŵ‖/‖W‖ of the solution with quantised factors."""
    product = p.product(s.left_BOR, s.right_BRI)
    target = p.weight_BOI - product if s.residual else p.weight_BOI
    return p.relative_error(p.round_main(target) + product)


RTN = BranchConfig(kind="none")
LQER = BranchConfig(kind="svd", start="error", objective="compensate")
LOFTQ = BranchConfig(kind="alternating", steps=10)
O1 = BranchConfig(kind="loraq", objective="compensate", start="error")
O2 = BranchConfig(kind="loraq", objective="shape", start="weight")
O1_ADAM = BranchConfig(kind="loraq", objective="compensate", start="error", solver="adam", steps=60)
O2_ADAM = BranchConfig(kind="loraq", solver="adam", steps=60)


@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (33, 33)])
def test_truncated_svd_reaches_the_eckart_young_bound(shape):
    w = weights(3, *shape)
    left, right = truncated_svd(w, 5)
    tail = torch.linalg.svdvals(w.double())[:, 5:].square().sum(-1).sqrt()
    error = (w.double() - left.double() @ right.double()).flatten(1).norm(dim=1)
    assert torch.allclose(error, tail, rtol=1e-5)
    assert torch.allclose(left.norm(dim=1), right.norm(dim=2), rtol=1e-4)  # √S on both sides


@pytest.mark.parametrize("shape", [(96, 80), (80, 120)])
@pytest.mark.parametrize("source", ["spectrum", "rounding error"])
def test_wide_matrices_get_nearly_the_best_factors(monkeypatch, shape, source):
    """Above EXACT_WIDTH, for a decaying spectrum and for the flat one of rounding errors."""
    w = weights(2, *shape)
    if source == "rounding error":
        w = w - fake_quantize(w, get_format("int4", block=16))
    best = truncated_svd(w, 8)
    monkeypatch.setattr(linear_algebra, "EXACT_WIDTH", 64)
    left, right = truncated_svd(w, 8)
    assert (left.shape, right.shape) == (best[0].shape, best[1].shape)
    assert torch.allclose(left.norm(dim=1), right.norm(dim=2), rtol=1e-4)
    found, least = ((w - a @ b).flatten(1).norm(dim=1) for a, b in ((left, right), best))
    assert (found < 1.005 * least).all() and not torch.equal(left, best[0])
    alone = truncated_svd(w[1:], 8)
    assert torch.allclose(alone[0] @ alone[1], (left @ right)[1:], atol=1e-5)


@pytest.mark.parametrize("shape", [(96, 80), (80, 120), (64, 64)])
def test_a_tracked_svd_follows_a_changing_matrix(shape):
    """Within 1 % of the optimum after three small changes."""
    w, moved = weights(2, *shape), weights(2, *shape, seed=9)
    projection = first_image(w, *truncated_svd(w, 8))
    for _ in range(3):
        w = w + 0.02 * moved
        left, right, projection = tracked_svd(w, 8, projection)
    found, least = (
        (w - a @ b).flatten(1).norm(dim=1) for a, b in ((left, right), truncated_svd(w, 8))
    )
    assert (found < 1.01 * least).all()
    assert torch.allclose(left.norm(dim=1), right.norm(dim=2), rtol=1e-4)


@pytest.mark.parametrize("select", ["weight", "output"])
@pytest.mark.parametrize("shape", [(96, 80), (80, 120)])
def test_alternation_that_tracks_ends_where_exact_svds_end(monkeypatch, shape, select):
    """Data-free at every width; by output errors only where exact SVDs are too slow."""
    options = replace(LOFTQ, select=select)
    w = weights(2, *shape)

    def output_error(main, left, right, units):
        return (w[units] - main - left @ right).flatten(1).norm(dim=1)

    p = problem(w, output_error=output_error)
    monkeypatch.setattr(alternating, "tracked_svd", lambda w, r, b: (*truncated_svd(w, r), b))
    exact = find(p, options)
    monkeypatch.undo()
    if select == "output":
        assert find(p, options).losses == exact.losses
        monkeypatch.setattr(linear_algebra, "EXACT_WIDTH", 64)
    tracked = find(p, options)
    assert tracked.losses != exact.losses
    assert min(tracked.losses) == pytest.approx(min(exact.losses), rel=0.01)


def test_least_squares_steps_are_stationary():
    g = torch.Generator().manual_seed(0)
    target = weights()
    right = torch.randn(2, 8, 64, generator=g)
    left = solve_left(target, right)
    gradient = (target - left @ right) @ right.mT
    assert gradient.abs().max() < 1e-2 * (target @ right.mT).abs().max() * 1e-2
    again = solve_right(target, left)
    gradient = left.mT @ (target - left @ again)
    assert gradient.abs().max() < 1e-4 * (left.mT @ target).abs().max()


def test_balance_and_rotation_keep_the_product():
    left, right = truncated_svd(weights(), 8)
    left, right = left * 3, right / 3
    balanced = balance(left, right)
    assert torch.allclose(balanced[0] @ balanced[1], left @ right, atol=1e-5)
    assert torch.allclose(balanced[0].norm(dim=1), balanced[1].norm(dim=2), rtol=1e-4)
    t = random_rotation(8, torch.Generator().manual_seed(0))
    assert torch.allclose(t @ t.T, torch.eye(8), atol=1e-5)
    assert torch.allclose((left @ t.T) @ (t @ right), left @ right, atol=1e-4)


def test_lqer_is_the_svd_of_the_quantisation_error():
    w = weights(1)
    p = problem(w, branch="fp16")
    s = find(p, LQER)
    error = (w - p.round_main(w))[0].double()
    u, sv, vh = torch.linalg.svd(error)
    expected = (u[:, :8] * sv[:8]) @ vh[:8]
    assert not s.residual
    assert torch.allclose((s.left_BOR @ s.right_BRI)[0].double(), expected, atol=1e-5)


@pytest.mark.parametrize("main,branch", [("int4", "int8"), ("mxfp4_e2m1", "mxfp8_e4m3")])
def test_each_method_improves_on_what_it_refines(main, branch):
    w = weights(4)
    p = problem(w, main=main, branch=branch)
    rtn = p.relative_error(p.round_main(w))
    errors = {
        name: final_error(p, find(p, options))
        for name, options in {
            "lqer": LQER,
            "loftq": LOFTQ,
            "o1": O1,
            "o2": O2,
            "o1a": O1_ADAM,
            "o2a": O2_ADAM,
            "svd": BranchConfig(kind="svd", start="weight"),
        }.items()
    }
    assert (errors["lqer"] < rtn).all()
    assert (errors["o1"] <= errors["lqer"] * (1 + 1e-6)).all()
    assert (errors["o1a"] <= errors["lqer"] * (1 + 1e-6)).all()
    assert (errors["loftq"] <= errors["svd"] * (1 + 1e-6)).all()
    assert (errors["o2"] < errors["svd"]).all()
    assert (errors["o2a"] <= errors["svd"] * (1 + 1e-6)).all()
    assert errors["o2"].mean() < errors["o1"].mean()


@pytest.mark.parametrize("options", [LOFTQ, O1, O2, O1_ADAM, O2_ADAM])
def test_the_last_loss_kept_is_what_the_stored_factors_reach(options):
    p = problem(weights())
    s = find(p, options)
    assert len(s.losses) >= 1
    assert final_error(p, s).mean().item() <= min(s.losses) * (1 + 1e-4)


@pytest.mark.parametrize("options", [O2, O2_ADAM, LOFTQ])
def test_a_unit_does_not_depend_on_its_batch(options):
    w = weights(3)
    together = final_error(problem(w), find(problem(w), options))
    alone = torch.cat([final_error(problem(x[None]), find(problem(x[None]), options)) for x in w])
    assert torch.allclose(together, alone, rtol=2e-2)


def test_rotation_changes_the_factors_and_not_what_they_can_express():
    w = weights()
    p = problem(w, branch="fp16")
    plain = find(p, BranchConfig(kind="loraq", steps=1))
    rotated = find(p, BranchConfig(kind="loraq", steps=1, rotation="random"))
    assert not torch.allclose(plain.left_BOR, rotated.left_BOR, atol=1e-3)
    assert torch.allclose(
        plain.left_BOR @ plain.right_BRI,
        rotated.left_BOR @ rotated.right_BRI,
        atol=1e-4,
    )


def test_a_plain_gradient_through_the_rounding_would_cancel():
    """Why O2 stops the gradient at Q: straight-through everywhere cancels the gradient of P."""
    w = weights(1)
    fmt = get_format("int4")
    product = torch.zeros_like(w).requires_grad_()

    def q_straight_through(t):
        return t + (fake_quantize(t.detach(), fmt) - t).detach()

    trap = (w - product - q_straight_through(w - product)).square().sum()
    (gradient,) = torch.autograd.grad(trap, product)
    assert gradient.abs().max() == 0


@pytest.mark.parametrize(
    "kind,starts",
    [
        ("svd", ("weight", "error")),
        ("alternating", ("weight", "zero")),
        ("loraq", ("weight", "error", "zero")),
    ],
)
def test_every_start_is_its_own(kind, starts):
    p = problem(weights())
    once = {} if kind == "svd" else {"steps": 1}
    lefts = [find(p, BranchConfig(kind=kind, start=start, **once)).left_BOR for start in starts]
    for number, left in enumerate(lefts):
        assert all(not torch.equal(left, other) for other in lefts[:number])


def test_output_selection_stops_at_the_first_round_that_does_not_improve():
    w = weights(2)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 40, 64, generator=g)
    calls = []

    def output_error(main, left, right, units):
        calls.append(units.tolist())
        return (x[units] @ (w[units] - main - left @ right).mT).square().sum((-2, -1))

    p = problem(w, output_error=output_error)
    s = find(p, BranchConfig(kind="alternating", select="output"))
    assert 2 <= len(calls) <= 100 and calls[0] == [0, 1]
    assert all(set(b) <= set(a) for a, b in itertools.pairwise(calls))
    assert s.losses == sorted(s.losses, reverse=True)


def test_invalid_options_raise():
    p = problem(weights())
    with pytest.raises(LoraqError, match="start=zero"):
        find(p, BranchConfig(kind="svd", start="zero"))
    with pytest.raises(LoraqError, match="start=zero"):
        find(p, BranchConfig(kind="alternating", start="error"))
    with pytest.raises(LoraqError, match="objective=shape"):
        find(p, BranchConfig(kind="alternating", objective="compensate"))
    with pytest.raises(LoraqError, match="calibration"):
        find(p, BranchConfig(kind="alternating", select="output"))
