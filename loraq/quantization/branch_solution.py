"""Solve a group's branch problem; a recipe without a branch has factors of rank 0."""

from __future__ import annotations

import torch

from loraq.branches.lookup import run_finder
from loraq.branches.problem import Problem, Solution
from loraq.config import BranchConfig


def solve_branch(problem: Problem, options: BranchConfig) -> Solution:
    """The branch that the finder of `options.kind` returns; factors of rank 0 for kind=none."""
    if options.kind == "none":
        b, o, i = problem.weight_BOI.shape
        empty = problem.weight_BOI.new_zeros(b, o, 0), problem.weight_BOI.new_zeros(b, 0, i)
        error = problem.relative_error(problem.round_main(problem.weight_BOI)).mean().item()
        return Solution(*empty, residual=False, losses=[error])
    with torch.enable_grad():
        return run_finder(problem, options)
