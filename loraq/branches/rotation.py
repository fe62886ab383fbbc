"""Rotations inside a branch: L·Tᵀ, T·R with T orthogonal leave P = L·R exactly as it was.

They fold offline and cost nothing at run time; what changes is how well the factors quantise.
random:  T Haar-random: spreads the columns' magnitudes over a scale block.
learned: from there, alternate A = Q(L·Tᵀ), B = Q(T·R) and the orthogonal Procrustes problem
         T = argmin ‖L·Tᵀ − A‖²_F + ‖T·R − B‖²_F = V·Uᵀ, where U·S·Vᵀ = LᵀA + R·Bᵀ (as ITQ does,
         Gong et al. 2013); of all rounds the one whose product P comes out best is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraq.branches.alternating import Best
from loraq.branches.linear_algebra import random_rotation
from loraq.branches.problem import Problem

ROUNDS = 30


def rotated(problem: Problem, left: Tensor, right: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The factors in the rotation `kind` (none, random, learned)."""
    if kind == "none":
        return left, right
    rank = left.shape[-1]
    t_BRR = torch.stack([random_rotation(rank, g) for g in problem.generators]).to(left)
    if kind == "random":
        return left @ t_BRR.mT, t_BRR @ right
    return _learned(problem, left, right, t_BRR)


def _learned(problem: Problem, left: Tensor, right: Tensor, t_BRR: Tensor) -> tuple[Tensor, Tensor]:
    product_BOI = left @ right
    best = Best(left, right)
    everyone = torch.arange(len(left), device=left.device)
    for _ in range(ROUNDS):
        turned_left, turned_right = left @ t_BRR.mT, t_BRR @ right
        a_BOR, b_BRI = problem.round_branch(turned_left), problem.round_branch(turned_right)
        error_B = problem.weighted(product_BOI - a_BOR @ b_BRI).flatten(1).norm(dim=1)
        best.offer(everyone, error_B, turned_left, turned_right)
        matched = (left.mT @ a_BOR + right @ b_BRI.mT).double()
        u_BRR, _, vh_BRR = torch.linalg.svd(matched)
        t_BRR = (vh_BRR.mT @ u_BRR.mT).to(left)
    return best.left, best.right
