"""One truncated SVD, without optimisation.

start=weight: P = SVD_r(W), main = Q(W − P)                  (SVDQuant's first round)
start=error:  P = SVD_r(W − Q(W)), main = Q(W) or Q(W − P)   (LQER, arXiv 2402.02446: Q(W))
weighting:    P = SVD_r(T·S)·S⁻¹ minimises ‖(T − P)S‖_F; S is the inputs' rms per channel
              (L²QER, arXiv 2402.02446) or E[xᵀx]^½ (QERA, arXiv 2410.06040)
"""

from __future__ import annotations

from torch import Tensor

from loraq.branches.linear_algebra import balance, truncated_svd
from loraq.branches.problem import Problem, Solution
from loraq.config import BranchConfig
from loraq.errors import LoraqError


def start_factors(problem: Problem, options: BranchConfig) -> tuple[Tensor, Tensor]:
    """Initial L, R: the (weighted) SVD of the weight or of its quantisation error."""
    w_BOI = problem.weight_BOI
    target_BOI = w_BOI if options.start == "weight" else w_BOI - problem.round_main(w_BOI)
    left, right = truncated_svd(problem.weighted(target_BOI), problem.rank)
    right = problem.unweighted(right)
    if options.split == 0.5 and problem.root_BII is None:
        return left, right
    return balance(left, right, options.split)


def find(problem: Problem, options: BranchConfig) -> Solution:
    if options.start == "zero":
        raise LoraqError(
            "quant.branch.start=zero with quant.branch.kind=svd gives an empty branch. Set "
            "quant.branch.start=weight or start=error, or use method=rtn for no branch."
        )
    left, right = start_factors(problem, options)
    residual = options.objective == "shape"
    product = problem.product(left, right)
    target = problem.weight_BOI - product if residual else problem.weight_BOI
    estimate = problem.round_main(target) + product
    return Solution(left, right, residual, [problem.relative_error(estimate).mean().item()])
