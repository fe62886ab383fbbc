"""Alternate P = SVD_r(W − Q) and Q = Q(W − P), keep the best round of each unit.

select=weight: best ‖W − Q − P‖_F, data-free      (LoftQ, arXiv 2310.08659)
select=output: best calibration output error; a unit stops at its first round without
               improvement                          (SVDQuant, arXiv 2411.05007)
start=weight: Q₀ = 0, so the first P is SVD_r(W).
start=zero:   P₀ = 0, a round that may win, then the first P is SVD_r(W − Q(W)) (LoftQ's own start).

select=output forms P and W − P in float64 and takes exact SVDs where they are affordable, as
SVDQuant's reference does: alternation is chaotic, and one scale that float32 puts on the other side
becomes another best round ten rounds later. select=weight follows no one's rounds: float32, and
each round's subspace is iterated for from the last one's, to nearly the same error in a part of the
time (experiments/bench/quantise.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraq.branches.linear_algebra import (
    first_image,
    svd_is_exact,
    thin_product,
    tracked_svd,
    truncated_svd,
)
from loraq.branches.problem import Problem, Solution
from loraq.config import BranchConfig
from loraq.errors import LoraqError


class Best:
    """The lowest score of each unit so far, with the factors that reached it."""

    def __init__(self, left_BOR: Tensor, right_BRI: Tensor) -> None:
        self.left, self.right = left_BOR.clone(), right_BRI.clone()
        self.score_B = torch.full((left_BOR.shape[0],), torch.inf, device=left_BOR.device)

    def offer(self, units: Tensor, score: Tensor, left: Tensor, right: Tensor) -> None:
        """Keep what improves; `score`, `left`, `right` are of the units numbered `units`."""
        improved = score < self.score_B[units]
        kept = units[improved]
        self.left[kept], self.right[kept] = left[improved], right[improved]
        self.score_B[kept] = score[improved]


def find(problem: Problem, options: BranchConfig) -> Solution:
    if options.objective != "shape":
        raise LoraqError(
            "quant.branch.kind=alternating re-rounds the main weight each round, which is "
            "objective=shape; for a fixed Q(W) use quant.branch.kind=svd (LQER)."
        )
    if options.start == "error":
        raise LoraqError(
            "quant.branch.start=error with quant.branch.kind=alternating is start=zero: from P = 0 "
            "the first round is the SVD of the error. Choose start=zero or start=weight."
        )
    by_output = options.select == "output"
    w_BOI = problem.weight_BOI.double() if by_output else problem.weight_BOI.float()
    b, o, i = w_BOI.shape
    tracked = not by_output or not svd_is_exact(w_BOI)
    best = Best(w_BOI.new_zeros(b, o, problem.rank), w_BOI.new_zeros(b, problem.rank, i))
    active, part, target, image = torch.arange(b, device=w_BOI.device), problem, w_BOI, None
    error = w_BOI.clone()
    if options.start == "zero":
        main, nothing = problem.round_main(w_BOI), (best.left.clone(), best.right.clone())
        error.sub_(main)
        best.offer(active, _score(part, main, error, *nothing, by_output), *nothing)
        del main  # at full size every matrix less counts

    losses: list[float] = []
    for _ in range(options.steps):
        before = best.score_B[active]
        if image is not None:
            left, right, image = tracked_svd(error, problem.rank, image)
        else:
            left, right = truncated_svd(error, problem.rank)
            image = first_image(error, left, right) if tracked else None
        factors = [problem.round_branch(factor).to(target) for factor in (left, right)]
        product = thin_product(*factors)
        rest = product.neg_().add_(target)
        main = problem.round_main(rest)
        score = _score(part, main, rest.sub_(main), left, right, by_output)
        del product, rest
        best.offer(active, score, left, right)
        losses.append(best.score_B.mean().item())
        going = score < before * (1 - (0.0 if by_output else options.tolerance))
        if not going.any():
            break
        if not going.all():
            active, target, main = active[going], target[going], main[going]
            part, image = problem.subset(active), None if image is None else image[going]
        error = torch.sub(target, main, out=error if error.shape == target.shape else None)
        del main
    return Solution(best.left, best.right, residual=True, losses=losses)


def _score(
    part: Problem, main: Tensor, missed: Tensor, left: Tensor, right: Tensor, by_output: bool
) -> Tensor:
    """Relative error of each unit (B,), of the outputs or of the weights; `missed` is W − Ŵ."""
    if by_output:
        return part.measured_error(main, left, right)
    return part.relative(missed)
