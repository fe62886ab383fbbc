"""One truncated SVD, nothing optimised.

start=weight: P = SVD_r(W), main = Q(W − P)                  (SVDQuant's first round)
start=error:  P = SVD_r(W − Q(W)), main = Q(W) or Q(W − P)   (LQER, arXiv 2402.02446, keeps Q(W))
"""

from __future__ import annotations

from loraq.branches import Problem, Solution
from loraq.branches.linear_algebra import truncated_svd
from loraq.config import BranchConfig
from loraq.errors import LoraqError


def start_factors(problem: Problem, start: str, seed_rank: int | None = None):
    """L, R where a branch starts: the SVD of the weight or of its quantisation error."""
    w_BOI = problem.weight_BOI
    target_BOI = w_BOI if start == "weight" else w_BOI - problem.round_main(w_BOI)
    return truncated_svd(target_BOI, seed_rank or problem.rank)


def find(problem: Problem, options: BranchConfig) -> Solution:
    if options.start == "zero":
        raise LoraqError(
            "quant.branch.start=zero with quant.branch.kind=svd is no branch at all. "
            "Choose start=weight or start=error, or kind=none."
        )
    left, right = start_factors(problem, options.start)
    residual = options.objective == "shape"
    target = problem.weight_BOI - problem.product(left, right) if residual else problem.weight_BOI
    estimate = problem.round_main(target) + problem.product(left, right)
    return Solution(left, right, residual, [problem.relative_error(estimate).mean().item()])
