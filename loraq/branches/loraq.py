"""LoRaQ: data-free optimisation of the factors, with their quantisation inside the objective.

objective=compensate (O1):  min ‖W − Q(W) − Qb(L)·Qb(R)‖²_F             with Q(W) fixed
objective=shape      (O2):  min ‖W − P − Q(W − P)‖²_F, P = Qb(L)·Qb(R)  Q is updated with P

solver=alternation: with the main weight fixed, closed-form least squares for L given Qb(R), then
for R given Qb(L), on the same objective.
solver=adam: gradient descent with a straight-through estimator for Qb. Straight-through for
Q(W − P) as well would cancel the gradient of P exactly, so Q is either constant (gradient=stop) or
has the derivative of a soft rounding (gradient=soft; Agustsson & Theis 2020), with which 1 − Q′ is
0 on average.
weighting: the same objectives on (…)·S, with S from the inputs (CALDERA, arXiv 2405.18886).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from loraq.branches.alternating import Best
from loraq.branches.linear_algebra import balance, solve_left, solve_right, thin_product
from loraq.branches.problem import Problem, Solution
from loraq.branches.rotation import rotate_factors
from loraq.branches.svd import start_factors
from loraq.config import BranchConfig
from loraq.errors import LoraqError
from loraq.utils.late_flag import LateFlag

SHARPNESS = 4.0
"""α of the soft rounding: slope 0.15 at a grid point, 2.1 at a rounding boundary."""
PATIENCE = {"alternation": 4, "adam": 40}
"""Rounds without a relative gain above `tolerance` after which a unit has converged."""


def find(problem: Problem, options: BranchConfig) -> Solution:
    left, right = rotate_factors(problem, *_start(problem, options), options.rotation)
    solve = _adam if options.solver == "adam" else _alternate
    return solve(problem, options, left, right)


def _start(problem: Problem, options: BranchConfig) -> tuple[Tensor, Tensor]:
    """The initial factors: an SVD, or for start=zero L = 0 and a random R, as in LoRA."""
    if options.start != "zero":
        return start_factors(problem, options)
    b, o, i = problem.weight_BOI.shape
    rows = [torch.randn(problem.rank, i, generator=g) / math.sqrt(i) for g in problem.generators]
    right_BRI = torch.stack(rows).to(problem.weight_BOI)
    return problem.weight_BOI.new_zeros(b, o, problem.rank), right_BRI


class _Progress:
    """The best factors and the convergence of each unit."""

    def __init__(self, problem: Problem, options: BranchConfig, left: Tensor, right: Tensor):
        self.best = Best(left, right)
        self.losses: list[Tensor] = []
        self.rounds = torch.zeros((), dtype=torch.int64, device=left.device)
        self.done, self.stop = self.rounds > 0, LateFlag()
        self.tolerance, self.patience = options.tolerance, PATIENCE[options.solver]
        self.mark_B = self.best.score_B.clone()
        self.idle_B = torch.zeros_like(self.mark_B, dtype=torch.int64)

    def converged(self, loss_B: Tensor, left: Tensor, right: Tensor) -> bool:
        """Record a round's relative errors (B,); True once every unit has converged.

        On a GPU, True comes a round late, and that round changes nothing.
        """
        self.rounds += ~self.done
        self.losses.append(loss_B.mean())
        loss_B = torch.where(self.done, torch.inf, loss_B)
        self.best.offer(torch.arange(len(loss_B), device=loss_B.device), loss_B, left, right)
        gained_B = self.best.score_B < self.mark_B * (1 - self.tolerance)
        self.mark_B = torch.where(gained_B, self.best.score_B, self.mark_B)
        self.idle_B = torch.where(gained_B, 0, self.idle_B + 1)
        self.done = self.done | (self.idle_B >= self.patience).all()
        return self.stop.read(self.done)

    def solution(self, residual: bool) -> Solution:
        """The best factors, with the losses of the rounds until convergence."""
        losses = torch.stack(self.losses)[: int(self.rounds)].tolist()
        return Solution(self.best.left, self.best.right, residual, losses)


def _alternate(problem: Problem, options: BranchConfig, left: Tensor, right: Tensor) -> Solution:
    w_BOI, shape = problem.weight_BOI, options.objective == "shape"
    main = problem.round_main(w_BOI)
    target = w_BOI - main
    progress = _Progress(problem, options, left, right)
    for _ in range(options.steps):  # in place: allocation takes a third of the time at full size
        error = thin_product(problem.round_branch(left), problem.round_branch(right)).neg_()
        if shape:
            del main  # limits peak memory
            main = problem.round_main(error.add_(w_BOI))
            torch.sub(w_BOI, main, out=target)
            error.sub_(main)
        else:
            error.sub_(main).add_(w_BOI)
        if progress.converged(problem.relative(error), left, right):
            break
        rounded = problem.round_branch(right)
        left = solve_left(problem.weighted(target), problem.weighted(rounded))
        right = solve_right(target, problem.round_branch(left))
        left, right = balance(left, right, options.split)
    return progress.solution(shape)


def _adam(problem: Problem, options: BranchConfig, left: Tensor, right: Tensor) -> Solution:
    """Adam on factors scaled to unit rms (so the learning rate is relative), cosine decay to 0."""
    w_BOI, shape = problem.weight_BOI, options.objective == "shape"
    main = problem.round_main(w_BOI)
    scales = [_rms(f, fallback=w_BOI) for f in (left, right)]
    free = [(f / s).requires_grad_() for f, s in zip((left, right), scales, strict=True)]
    optimizer = torch.optim.Adam(free, lr=options.learning_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    progress = _Progress(problem, options, left, right)
    for _ in range(options.steps):
        factors = [f * s for f, s in zip(free, scales, strict=True)]
        rounded = [_straight_through(f, problem.round_branch) for f in factors]
        product = rounded[0] @ rounded[1]
        if shape and options.gradient == "soft":
            main = _soft_gradient(w_BOI - product, problem)
        elif shape:
            main = problem.round_main(w_BOI - product.detach())
        error_BOI = problem.weighted(w_BOI - main - product)
        error_B = error_BOI.flatten(1).square().sum(1) / problem.weight_norm.square()
        with torch.no_grad():
            done = progress.converged(error_B.detach().sqrt(), *(f.detach() for f in factors))
        if done:
            break
        optimizer.zero_grad()
        error_B.sum().backward()
        optimizer.step()
        schedule.step()
    return progress.solution(shape)


def _rms(factor: Tensor, fallback: Tensor) -> Tensor:
    """Root mean square per unit (B, 1, 1); that of `fallback` for a factor of zeros."""
    rms, other = (f.square().mean((-2, -1), keepdim=True).sqrt() for f in (factor, fallback))
    return torch.where(rms > 0, rms, other)


def _soft_gradient(target: Tensor, problem: Problem) -> Tensor:
    """Q(v) in the forward pass; the derivative of a soft rounding on Q's grid in the backward pass.

    s(y) = ⌊y⌋ + ½ + ½·tanh(αr)/tanh(α/2), r = y − ⌊y⌋ − ½: s′ is small at a grid point and large
    at a rounding boundary.
    """
    if problem.step_main is None:
        raise LoraqError(
            "quant.branch.gradient=soft needs a main format with a uniform grid (int or mxint). "
            "Set quant.branch.gradient=stop, or use format@quant.weight=int4."
        )
    values = target.detach()
    y = values / problem.step_main(values).clamp_min(1e-30)
    r = y - y.floor() - 0.5
    slope = 0.5 * SHARPNESS / math.tanh(SHARPNESS / 2) / torch.cosh(SHARPNESS * r).square()
    return problem.round_main(values) + slope * (target - values)


def _straight_through(x: Tensor, round_values: Callable[[Tensor], Tensor]) -> Tensor:
    """Q(x) in the forward pass, the identity in the backward pass (Bengio et al. 2013)."""
    return x + (round_values(x.detach()) - x).detach()
