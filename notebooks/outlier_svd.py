"""An example of a branch finder of one's own: alternation that minds outliers.

A group's scale follows from its largest entry, so what stands out of W − P costs most. Each round
takes P from the SVD of what the main weight leaves, W − Q(W − P), plus what stands out of W − P, so
that the next P reaches there; of all rounds each unit keeps its best. Data-free.

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
"""In standard deviations of a row of W − P: what lies beyond stands out."""
ROUNDS = 20


def find(problem: Problem, options: BranchConfig) -> Solution:
    if options.objective != "shape" or options.start != "weight":
        raise LoraqError("outlier_svd re-rounds W − P: leave objective=shape and start=weight.")
    w_BOI = problem.weight_BOI
    units = torch.arange(len(w_BOI), device=w_BOI.device)
    left, right = truncated_svd(w_BOI, problem.rank)
    image = first_image(w_BOI, left, right)
    best, losses = Best(left, right), []
    for _ in range(min(options.steps, ROUNDS)):
        product = problem.product(left, right)
        rest = w_BOI - product
        main = problem.round_main(rest)
        best.offer(units, problem.relative_error(main + product), left, right)
        losses.append(best.score_B.mean().item())
        limit = THRESHOLD * rest.std(dim=-1, keepdim=True)
        outliers = rest - rest.clamp(-limit, limit)
        left, right, image = tracked_svd(w_BOI - main + outliers, problem.rank, image)
    return Solution(best.left, best.right, residual=True, losses=losses)
