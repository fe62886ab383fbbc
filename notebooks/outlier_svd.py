"""An example of a custom branch finder: alternation that reduces outliers. Data-free.

The largest entry of a group determines its scale, so outliers of W − P increase the error most.
Each round computes P from the SVD of W − Q(W − P) plus the outliers of W − P, so that the next P
reduces them. Each unit keeps its best round.

    loraq run method=loraq_o2 quant.branch.kind=notebooks/outlier_svd.py

Shapes: w_BOI units × out × in, left_BOR, right_BRI.
"""

from __future__ import annotations

import torch

from loraq.branches import Problem, Solution
from loraq.branches.alternating import Best
from loraq.branches.linear_algebra import first_image, tracked_svd, truncated_svd
from loraq.config import BranchConfig
from loraq.errors import LoraqError

THRESHOLD = 2.0
"""Outliers are entries of W − P beyond this many standard deviations of their row."""
ROUNDS = 20


def find(problem: Problem, options: BranchConfig) -> Solution:
    if options.objective != "shape" or options.start != "weight":
        raise LoraqError(
            "outlier_svd needs quant.branch.objective=shape and quant.branch.start=weight."
        )
    w_BOI = problem.weight_BOI
    units = torch.arange(len(w_BOI), device=w_BOI.device)
    left, right = truncated_svd(w_BOI, problem.rank)
    projection = first_image(w_BOI, left, right)
    best, losses = Best(left, right), []
    for _ in range(min(options.steps, ROUNDS)):
        product = problem.product(left, right)
        rest = w_BOI - product
        main = problem.round_main(rest)
        best.offer(units, problem.relative_error(main + product), left, right)
        losses.append(best.score_B.mean().item())
        limit = THRESHOLD * rest.std(dim=-1, keepdim=True)
        outliers = rest - rest.clamp(-limit, limit)
        left, right, projection = tracked_svd(w_BOI - main + outliers, problem.rank, projection)
    return Solution(best.left, best.right, residual=True, losses=losses)
