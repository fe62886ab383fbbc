"""LoRaQ: factors optimised with their own quantisation inside the objective, from weights alone.

objective=compensate (O1):  min ‖W − Q(W) − Qb(L)·Qb(R)‖²_F           with Q(W) fixed
objective=shape      (O2):  min ‖W − P − Q(W − P)‖²_F, P = Qb(L)·Qb(R)  main is re-rounded

solver=alternation: with the main weight fixed, least squares for L given Qb(R), then for R given
Qb(L): closed-form steps on the same objective, each solved around the other's rounding.
solver=adam: gradient descent, straight-through for Qb. A straight-through estimate through
Q(W − P) as well would cancel P exactly; so it is held constant (gradient=stop), or its derivative
is that of a soft rounding (gradient=soft: Agustsson & Theis 2020), 0 on average of 1 − Q′.
weighting: the same objectives on (…)·S, S from the inputs (CALDERA, arXiv 2405.18886).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from loraq.branches.alternating import Best
from loraq.branches.linear_algebra import balance, solve_left, solve_right, thin_product
from loraq.branches.problem import Problem, Solution
from loraq.branches.rotation import rotated
from loraq.branches.svd import start_factors
from loraq.config import BranchConfig
from loraq.errors import LoraqError

SHARPNESS = 4.0
"""α of the soft rounding: its slope runs from 0.15 at a grid point to 2.1 at a boundary."""
PATIENCE = {"alternation": 4, "adam": 40}
"""Rounds without relative gain above `tolerance` before a unit counts as converged."""


def find(problem: Problem, options: BranchConfig) -> Solution:
    left, right = rotated(problem, *_start(problem, options), options.rotation)
    solve = _adam if options.solver == "adam" else _alternate
    return solve(problem, options, left, right)


def _start(problem: Problem, options: BranchConfig) -> tuple[Tensor, Tensor]:
    """The start's SVD; `zero` is P = 0 with a random R, as LoRA starts (no direction preferred)."""
    if options.start != "zero":
        return start_factors(problem, options)
    b, o, i = problem.weight_BOI.shape
    rows = [torch.randn(problem.rank, i, generator=g) / math.sqrt(i) for g in problem.generators]
    right_BRI = torch.stack(rows).to(problem.weight_BOI)
    return problem.weight_BOI.new_zeros(b, o, problem.rank), right_BRI


class _Progress:
    """Keeps each unit's best factors and says when every unit has converged."""

    def __init__(self, problem: Problem, options: BranchConfig, left: Tensor, right: Tensor):
        self.best = Best(left, right)
        self.losses: list[float] = []
        self.tolerance, self.patience = options.tolerance, PATIENCE[options.solver]
        self.mark_B = self.best.score_B.clone()
        self.idle_B = torch.zeros_like(self.mark_B, dtype=torch.int64)

    def converged(self, loss_B: Tensor, left: Tensor, right: Tensor) -> bool:
        """Note this round's relative errors (B,); True once no unit gains any more."""
        self.best.offer(torch.arange(len(loss_B), device=loss_B.device), loss_B, left, right)
        self.losses.append(loss_B.mean().item())
        gained_B = self.best.score_B < self.mark_B * (1 - self.tolerance)
        self.mark_B = torch.where(gained_B, self.best.score_B, self.mark_B)
        self.idle_B = torch.where(gained_B, 0, self.idle_B + 1)
        return bool((self.idle_B >= self.patience).all())


def _alternate(problem: Problem, options: BranchConfig, left: Tensor, right: Tensor) -> Solution:
    w_BOI, shape = problem.weight_BOI, options.objective == "shape"
    main = problem.round_main(w_BOI)
    target = w_BOI - main
    progress = _Progress(problem, options, left, right)
    for _ in range(options.steps):  # in place: at full size new memory costs a third of the time
        missed = thin_product(problem.round_branch(left), problem.round_branch(right)).neg_()
        if shape:
            del main  # before the next one is there
            main = problem.round_main(missed.add_(w_BOI))
            torch.sub(w_BOI, main, out=target)
            missed.sub_(main)
        else:
            missed.sub_(main).add_(w_BOI)
        if progress.converged(problem.relative(missed), left, right):
            break
        rounded = problem.round_branch(right)
        left = solve_left(problem.weighted(target), problem.weighted(rounded))
        right = solve_right(target, problem.round_branch(left))
        left, right = balance(left, right, options.split)
    return Solution(progress.best.left, progress.best.right, shape, progress.losses)


def _adam(problem: Problem, options: BranchConfig, left: Tensor, right: Tensor) -> Solution:
    """Adam on unit-scaled factors (learning rate relative to their rms), cosine decay to zero."""
    w_BOI, shape = problem.weight_BOI, options.objective == "shape"
    main = problem.round_main(w_BOI)
    scales = [_rms(f, otherwise=w_BOI) for f in (left, right)]
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
    return Solution(progress.best.left, progress.best.right, shape, progress.losses)


def _rms(factor: Tensor, otherwise: Tensor) -> Tensor:
    """Root mean square per unit (B, 1, 1); a factor that starts at zero takes the weight's."""
    rms, fallback = (f.square().mean((-2, -1), keepdim=True).sqrt() for f in (factor, otherwise))
    return torch.where(rms > 0, rms, fallback)


def _soft_gradient(target: Tensor, problem: Problem) -> Tensor:
    """Q(v) forwards; backwards the derivative of a soft rounding of v on Q's own grid.

    s(y) = ⌊y⌋ + ½ + ½·tanh(αr)/tanh(α/2), r = y − ⌊y⌋ − ½: s′ is small at a grid point and large
    at a rounding boundary.
    """
    if problem.step_main is None:
        raise LoraqError(
            "quant.branch.gradient=soft needs a main format with an even grid (int or mxint). "
            "Set quant.branch.gradient=stop, or use format@quant.weight=int4."
        )
    held = target.detach()
    y = held / problem.step_main(held).clamp_min(1e-30)
    r = y - y.floor() - 0.5
    slope = 0.5 * SHARPNESS / math.tanh(SHARPNESS / 2) / torch.cosh(SHARPNESS * r).square()
    main: Tensor = problem.round_main(held) + slope * (target - held)
    return main


def _straight_through(x: Tensor, rounding) -> Tensor:
    """Q(x) forwards, identity backwards (Bengio et al. 2013)."""
    return x + (rounding(x.detach()) - x).detach()
