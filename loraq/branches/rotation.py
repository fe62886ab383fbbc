"""Rotations inside a branch: L·Tᵀ and T·R with an orthogonal T have the same product P = L·R.

They are applied offline, without cost at run time, and change only the factors' quantisation error.
random:  T is Haar-random; it distributes the columns' magnitudes over a scale block.
learned: from a random T, alternate A = Q(L·Tᵀ), B = Q(T·R) and the orthogonal Procrustes problem
         T = argmin ‖L·Tᵀ − A‖²_F + ‖T·R − B‖²_F = V·Uᵀ, where U·S·Vᵀ = LᵀA + R·Bᵀ (as in ITQ,
         Gong et al. 2013); the round with the smallest error of P is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraq.branches.alternating import Best
from loraq.branches.linear_algebra import random_rotation
from loraq.branches.problem import Problem

ROUNDS = 30


def rotate_factors(
    problem: Problem,
    left: Tensor,
    right: Tensor,
    rotation: str,
) -> tuple[Tensor, Tensor]:
    """The factors after the rotation: none, random or learned."""
    if rotation == "none":
        return left, right
    rank = left.shape[-1]
    t_BRR = torch.stack([random_rotation(rank, g) for g in problem.generators]).to(left)
    if rotation == "random":
        return left @ t_BRR.mT, t_BRR @ right
    return _learned(problem, left, right, t_BRR)


def _learned(problem: Problem, left: Tensor, right: Tensor, t_BRR: Tensor) -> tuple[Tensor, Tensor]:
    product_BOI = left @ right
    best = Best(left, right)
    units = torch.arange(len(left), device=left.device)
    for _ in range(ROUNDS):
        rotated_left, rotated_right = left @ t_BRR.mT, t_BRR @ right
        a_BOR, b_BRI = problem.round_branch(rotated_left), problem.round_branch(rotated_right)
        error_B = problem.weighted(product_BOI - a_BOR @ b_BRI).flatten(1).norm(dim=1)
        best.offer(units, error_B, rotated_left, rotated_right)
        matched = (left.mT @ a_BOR + right @ b_BRI.mT).double()
        u_BRR, _, vh_BRR = torch.linalg.svd(matched)
        t_BRR = (vh_BRR.mT @ u_BRR.mT).to(left)
    return best.left, best.right
