"""Truncated SVDs of batches of weights, and the least-squares steps of alternation.

Shapes: w_BOI a batch of out × in matrices, left_BOR, right_BRI factors with P = left·right.
"""

from __future__ import annotations

import torch
from torch import Tensor


def truncated_svd(w_BOI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-r factors L = U√S, R = √S Vᵀ in the Frobenius norm (Eckart–Young), of w's dtype.

    Works on the float64 Gram matrix of the shorter side: its eigenvectors are the singular
    vectors, at a quarter of a full SVD's time; squaring the condition number costs only the
    directions below 1e-8 of the largest, which a rank-r head never contains usefully.
    """
    w = w_BOI.double()
    if w.shape[-2] >= w.shape[-1]:
        v_BIR = torch.linalg.eigh(w.mT @ w).eigenvectors[..., -rank:].flip(-1)
        us_BOR = w @ v_BIR
        s_BR = us_BOR.norm(dim=-2).clamp_min(1e-300)
        left, right = us_BOR / s_BR.sqrt()[..., None, :], (v_BIR * s_BR.sqrt()[..., None, :]).mT
    else:
        u_BOR = torch.linalg.eigh(w @ w.mT).eigenvectors[..., -rank:].flip(-1)
        sv_BRI = u_BOR.mT @ w
        s_BR = sv_BRI.norm(dim=-1).clamp_min(1e-300)
        left, right = u_BOR * s_BR.sqrt()[..., None, :], sv_BRI / s_BR.sqrt()[..., :, None]
    return left.to(w_BOI.dtype), right.to(w_BOI.dtype)


def solve_left(target_BOI: Tensor, right_BRI: Tensor) -> Tensor:
    """argmin_L ‖T − L·R‖²_F = T·Rᵀ·(R·Rᵀ)⁻¹, with a relative ridge of 1e-7 for lost ranks."""
    return _ridge_solve(right_BRI @ right_BRI.mT, right_BRI @ target_BOI.mT).mT


def solve_right(target_BOI: Tensor, left_BOR: Tensor) -> Tensor:
    """argmin_R ‖T − L·R‖²_F = (Lᵀ·L)⁻¹·Lᵀ·T, with the same ridge."""
    return _ridge_solve(left_BOR.mT @ left_BOR, left_BOR.mT @ target_BOI)


def _ridge_solve(gram_BRR: Tensor, rhs_BRN: Tensor) -> Tensor:
    gram = gram_BRR.double()
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None].clamp_min(1e-30)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + 1e-7 * mean * eye, rhs_BRN.double()).to(rhs_BRN.dtype)


def balance(left_BOR: Tensor, right_BRI: Tensor, split: float = 0.5) -> tuple[Tensor, Tensor]:
    """Share every rank-one term's size s_r = ‖L_r‖·‖R_r‖ as s^split and s^(1−split), same product.

    split=0.5 is the balanced ‖L_r‖ = ‖R_r‖ of L = U√S, R = √SVᵀ; 0 puts all of it into R.
    """
    l_BR, r_BR = left_BOR.norm(dim=-2), right_BRI.norm(dim=-1)
    alive = (l_BR > 0) & (r_BR > 0)
    if split == 0.5:  # one root of the quotient, not two: last bits count in alternation
        ratio = (r_BR / l_BR.clamp_min(1e-30)).sqrt()
    else:
        ratio = r_BR.clamp_min(1e-30).pow(split) / l_BR.clamp_min(1e-30).pow(1 - split)
    ratio = torch.where(alive, ratio, torch.ones_like(l_BR))
    return left_BOR * ratio[:, None, :], right_BRI / ratio[..., None]


def root_and_inverse(second_BII: Tensor) -> tuple[Tensor, Tensor]:
    """S = H^½ and S⁻¹ of second moments H (B, I, I), symmetric, float32.

    Directions below 1e-6 of the mean energy count as having that much: nothing is known of them,
    and an unbounded S⁻¹ would put all error there.
    """
    values_BI, vectors_BII = torch.linalg.eigh(second_BII.double())
    floor = 1e-6 * values_BI.mean(-1, keepdim=True).clamp_min(1e-30)
    root_BI = values_BI.clamp_min(floor).sqrt()
    root = (vectors_BII * root_BI[:, None, :]) @ vectors_BII.mT
    inverse = (vectors_BII / root_BI[:, None, :]) @ vectors_BII.mT
    return root.float(), inverse.float()


def random_rotation(rank: int, generator: torch.Generator) -> Tensor:
    """A Haar-random orthogonal T (r × r): L·Tᵀ, T·R leave the product as it was."""
    q, r = torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).float()
