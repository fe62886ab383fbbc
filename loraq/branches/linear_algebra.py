"""Truncated SVDs of batches of weights, and the least-squares steps of alternation.

Shapes: w_BOI a batch of out × in matrices, left_BOR, right_BRI factors with P = left·right.
"""

from __future__ import annotations

import torch
from torch import Tensor

EXACT_WIDTH = 768
"""Up to this shorter side an SVD is exact; above it the leading subspace is iterated for."""
ITERATIONS = 8
"""Subspace iterations from a random start."""


def svd_is_exact(w_BOI: Tensor) -> bool:
    """Whether `truncated_svd` takes full decompositions of matrices of this size."""
    return min(w_BOI.shape[-2:]) <= EXACT_WIDTH


def truncated_svd(w_BOI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-r factors L = U√S, R = √S Vᵀ in the Frobenius norm (Eckart–Young), of w's dtype.

    Matrices with a shorter side above EXACT_WIDTH get factors whose error is above the best by some
    tenths of a per cent: a full decomposition takes cubic time, and minutes a model.
    """
    w, find = w_BOI.double(), _eigenvectors if svd_is_exact(w_BOI) else _leading
    if w.shape[-2] >= w.shape[-1]:
        left, right = _from_right(w, find(w.mT, rank))
    else:
        left, right = _from_left(w, find(w, rank))
    return left.to(w_BOI.dtype), right.to(w_BOI.dtype)


def tracked_svd(w_BOI: Tensor, rank: int, basis_BMK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `truncated_svd`, nearly, of a matrix that changes little from call to call, in w's dtype.

    One subspace iteration from the last call's basis of the shorter side (before any,
    `first_basis`): the rounds of an alternation iterate together. Returns L, R, the next basis.
    """
    tall = w_BOI.shape[-2] >= w_BOI.shape[-1]
    a_BNM = w_BOI if tall else w_BOI.mT
    basis_BMK = torch.linalg.qr(a_BNM.mT @ (a_BNM @ basis_BMK)).Q
    image_BNK = a_BNM @ basis_BMK
    turn_BKR = torch.linalg.eigh((image_BNK.mT @ image_BNK).double()).eigenvectors
    turn_BKR = turn_BKR[..., -rank:].flip(-1).to(w_BOI)
    us_BNR, v_BMR = image_BNK @ turn_BKR, basis_BMK @ turn_BKR
    root_BR = us_BNR.norm(dim=-2).clamp_min(torch.finfo(w_BOI.dtype).tiny).sqrt()[..., None, :]
    left, right = us_BNR / root_BR, v_BMR * root_BR
    return (left, right.mT, basis_BMK) if tall else (right, left.mT, basis_BMK)


def first_basis(left_BOR: Tensor, right_BRI: Tensor) -> Tensor:
    """What `tracked_svd` starts from: factors of the shorter side, and some random directions."""
    tall = left_BOR.shape[-2] >= right_BRI.shape[-1]
    start_BMR = right_BRI.mT if tall else left_BOR
    (height, rank), whole = start_BMR.shape[-2:], left_BOR.shape[-2] + right_BRI.shape[-1]
    more = _block(height, whole - height, rank) - rank
    return torch.linalg.qr(torch.cat([start_BMR, _random(start_BMR, more)], dim=-1)).Q


def _from_right(w_BOI: Tensor, v_BIR: Tensor) -> tuple[Tensor, Tensor]:
    """L, R of W's projection on right singular vectors."""
    us_BOR = w_BOI @ v_BIR
    s_BR = us_BOR.norm(dim=-2).clamp_min(torch.finfo(w_BOI.dtype).tiny)
    return us_BOR / s_BR.sqrt()[..., None, :], (v_BIR * s_BR.sqrt()[..., None, :]).mT


def _from_left(w_BOI: Tensor, u_BOR: Tensor) -> tuple[Tensor, Tensor]:
    """The same for left singular vectors."""
    sv_BRI = u_BOR.mT @ w_BOI
    s_BR = sv_BRI.norm(dim=-1).clamp_min(torch.finfo(w_BOI.dtype).tiny)
    return u_BOR * s_BR.sqrt()[..., None, :], sv_BRI / s_BR.sqrt()[..., :, None]


def _eigenvectors(a_BMN: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors (B, M, r) of A, as eigenvectors of A·Aᵀ, float64.

    At a quarter of a full SVD's time; squaring the condition number costs only the directions below
    1e-8 of the largest, which a rank-r head never contains usefully.
    """
    return torch.linalg.eigh(a_BMN @ a_BMN.mT).eigenvectors[..., -rank:].flip(-1)


def _leading(a_BMN: Tensor, rank: int) -> Tensor:
    """Nearly those vectors: randomised subspace iteration (Halko et al. 2011, algorithm 4.4).

    In float32: the vectors need not be exact to be orthonormal.
    """
    a = a_BMN.float()
    u_BMK = torch.linalg.qr(_random(a, _block(*a.shape[-2:], rank))).Q
    for _ in range(ITERATIONS):
        u_BMK = torch.linalg.qr(a @ (a.mT @ u_BMK)).Q
    turn_BKR = _eigenvectors((u_BMK.mT @ a).double(), rank)
    return torch.linalg.qr(u_BMK.double() @ turn_BKR).Q


def _block(height: int, width: int, rank: int) -> int:
    """Columns to iterate with: some more than the rank, which the leading ones converge by."""
    return min(height, width, rank + max(8, rank // 4))


def _random(like_BMN: Tensor, columns: int) -> Tensor:
    """(B, M, columns), the same for every matrix, so that a unit does not depend on its batch."""
    g = torch.Generator().manual_seed(0)
    start_MK = torch.randn(like_BMN.shape[-2], columns, generator=g).to(like_BMN)
    return start_MK.expand(*like_BMN.shape[:-2], -1, -1)


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
