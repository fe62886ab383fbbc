"""Alternation of P = SVD_r(W − Q) and Q = Q(W − P); each unit keeps its best round.

select=weight: lowest ‖W − Q − P‖_F, data-free                     (LoftQ, arXiv 2310.08659)
select=output: lowest calibration output error; a unit stops at its first round without
               improvement                                         (SVDQuant, arXiv 2411.05007)
start=weight: Q₀ = 0, so the first P is SVD_r(W).
start=zero:   P₀ = 0 is the first round, then P = SVD_r(W − Q(W))  (LoftQ's start).

select=output computes P and W − P in float64, with exact SVDs up to EXACT_WIDTH, as SVDQuant's
reference does: alternation is chaotic, and one scale that float32 rounds differently changes the
best round ten rounds later. select=weight reproduces no reference: it uses float32, and each
round's subspace iteration starts from the previous subspace, which reaches nearly the same error in
a fraction of the time (experiments/bench/quantise.py).
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
    """The factors with the lowest score so far, per unit."""

    def __init__(self, left_BOR: Tensor, right_BRI: Tensor) -> None:
        self.left, self.right = left_BOR.clone(), right_BRI.clone()
        self.score_B = torch.full((left_BOR.shape[0],), torch.inf, device=left_BOR.device)

    def __repr__(self) -> str:
        return f"Best(units={len(self.left)}, mean score={self.score_B.mean().item():.4g})"

    def offer(self, units: Tensor, score: Tensor, left: Tensor, right: Tensor) -> None:
        """Keep the factors of the units (indices `units`) whose score improves.

        Without a boolean index, for which the host would wait for a GPU.
        """
        before = self.score_B[units]
        improved = score < before
        self.score_B[units] = torch.where(improved, score, before)
        for held, new in ((self.left, left), (self.right, right)):
            held[units] = torch.where(improved[:, None, None], new, held[units])


def find(problem: Problem, options: BranchConfig) -> Solution:
    if options.objective != "shape":
        raise LoraqError(
            "quant.branch.kind=alternating rounds the main weight again in each round and needs "
            "quant.branch.objective=shape. For a fixed Q(W), set quant.branch.kind=svd (LQER)."
        )
    if options.start == "error":
        raise LoraqError(
            "quant.branch.start=error has no effect with quant.branch.kind=alternating: the first "
            "round from P = 0 is the SVD of the error. Set quant.branch.start=zero or start=weight."
        )
    by_output = options.select == "output"
    w_BOI = problem.weight_BOI.double() if by_output else problem.weight_BOI.float()
    b, o, i = w_BOI.shape
    tracked = not by_output or not svd_is_exact(w_BOI)
    best = Best(w_BOI.new_zeros(b, o, problem.rank), w_BOI.new_zeros(b, problem.rank, i))
    active, part, target, projection = torch.arange(b, device=w_BOI.device), problem, w_BOI, None
    error = w_BOI.clone()
    if options.start == "zero":
        main, zeros = problem.round_main(w_BOI), (best.left.clone(), best.right.clone())
        error.sub_(main)
        best.offer(active, _score(part, main, error, *zeros, by_output), *zeros)
        del main  # limits peak memory

    losses: list[Tensor] = []
    for _ in range(options.steps):
        before = best.score_B[active]
        if projection is not None:
            left, right, projection = tracked_svd(error, problem.rank, projection)
        else:
            left, right = truncated_svd(error, problem.rank)
            projection = first_image(error, left, right) if tracked else None
        factors = [problem.round_branch(factor).to(target) for factor in (left, right)]
        product = thin_product(*factors)
        rest = product.neg_().add_(target)
        main = problem.round_main(rest)
        score = _score(part, main, rest.sub_(main), left, right, by_output)
        del product, rest
        best.offer(active, score, left, right)
        losses.append(best.score_B.mean())
        improving = score < before * (1 - (0.0 if by_output else options.tolerance))
        kept = improving.nonzero()[:, 0]  # the round's one wait for a GPU, beside the SVD's
        if not len(kept):
            break
        if len(kept) < len(active):
            active, target, main = active[kept], target[kept], main[kept]
            part = problem.subset(active)
            projection = None if projection is None else projection[kept]
        error = torch.sub(target, main, out=error if error.shape == target.shape else None)
        del main
    numbers = torch.stack(losses).tolist()  # read at once: the host waits once for a GPU
    return Solution(best.left, best.right, residual=True, losses=numbers)


def _score(
    part: Problem, main: Tensor, error: Tensor, left: Tensor, right: Tensor, by_output: bool
) -> Tensor:
    """Relative error per unit (B,), of the outputs or of the weights; error: W − Ŵ."""
    if by_output:
        return part.measured_error(main, left, right)
    return part.relative(error)
