"""Truncated SVDs of batches of weights, and the least-squares steps of alternation.

Shapes: w_BOI a batch of out × in matrices, left_BOR, right_BRI factors with P = left·right.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraq.utils import batch_invariance

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
    tall = w_BOI.shape[-2] >= w_BOI.shape[-1]
    find = _eigenvectors if svd_is_exact(w_BOI) else _leading
    vectors, w = find(w_BOI.mT if tall else w_BOI, rank), w_BOI.double()
    left, right = _from_right(w, vectors) if tall else _from_left(w, vectors)
    return left.to(w_BOI.dtype), right.to(w_BOI.dtype)


def tracked_svd(w_BOI: Tensor, rank: int, image_BKN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `truncated_svd`, nearly, of a matrix that changes little from call to call, in w's dtype.

    One subspace iteration from what the last call's matrix made of its basis (before any,
    `first_image`): the rounds of an alternation iterate together. Returns L, R, the next image.
    N is the longer side, M the shorter, K a little more than the rank.
    """
    tall = w_BOI.shape[-2] >= w_BOI.shape[-1]
    a_BNM = w_BOI if tall else w_BOI.mT
    v_BKM = torch.linalg.qr(thin_product(image_BKN, a_BNM).mT).Q.mT
    image_BKN = thin_product(v_BKM, a_BNM.mT)
    gram_BKK = thin_product(image_BKN, image_BKN.mT).double()
    turn_BRK = torch.linalg.eigh(gram_BKK).eigenvectors[..., -rank:].flip(-1).mT.to(w_BOI)
    us_BRN, v_BRM = thin_product(turn_BRK, image_BKN), thin_product(turn_BRK, v_BKM)
    root_BR = us_BRN.norm(dim=-1).clamp_min(torch.finfo(w_BOI.dtype).tiny).sqrt()[..., None]
    long, short = us_BRN / root_BR, v_BRM * root_BR
    return (long.mT, short, image_BKN) if tall else (short.mT, long, image_BKN)


def first_image(w_BOI: Tensor, left_BOR: Tensor, right_BRI: Tensor) -> Tensor:
    """What `tracked_svd` starts from: the image of w's factors and of some random directions."""
    tall = left_BOR.shape[-2] >= right_BRI.shape[-1]
    start_BMR = right_BRI.mT if tall else left_BOR
    (height, rank), whole = start_BMR.shape[-2:], left_BOR.shape[-2] + right_BRI.shape[-1]
    more = _block(height, whole - height, rank) - rank
    basis_BMK = torch.linalg.qr(torch.cat([start_BMR, _random(start_BMR, more)], dim=-1)).Q
    return thin_product(basis_BMK.mT, w_BOI.mT if tall else w_BOI)


def thin_product(x_BKN: Tensor, w_BNM: Tensor) -> Tensor:
    """X·W of few rows, or few columns between them, by whichever library is fit for it.

    Matrix by matrix where that is oneDNN: a unit depends on its batch no more than elsewhere.
    """
    if x_BKN.dtype != torch.float32 or not batch_invariance.use_onednn(x_BKN.device.type):
        return x_BKN @ w_BNM
    pairs = zip(x_BKN.contiguous(), w_BNM.mT, strict=True)
    found = [batch_invariance.onednn_product(x, w) for x, w in pairs]
    return found[0][None] if len(found) == 1 else torch.stack(found)


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
    a = a_BMN.double()
    return torch.linalg.eigh(a @ a.mT).eigenvectors[..., -rank:].flip(-1)


def _leading(a_BMN: Tensor, rank: int) -> Tensor:
    """Nearly those vectors: randomised subspace iteration (Halko et al. 2011, algorithm 4.4).

    In float32: the vectors need not be exact to be orthonormal.
    """
    a = a_BMN.float()
    u_BMK = torch.linalg.qr(_random(a, _block(*a.shape[-2:], rank))).Q
    for _ in range(ITERATIONS):
        image_BKN = thin_product(u_BMK.mT, a)
        u_BMK = torch.linalg.qr(thin_product(image_BKN, a.mT).mT).Q
    turn_BKR = _eigenvectors(thin_product(u_BMK.mT, a), rank)
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
    gram_BRR = thin_product(right_BRI, right_BRI.mT)
    return _ridge_solve(gram_BRR, thin_product(right_BRI, target_BOI.mT)).mT


def solve_right(target_BOI: Tensor, left_BOR: Tensor) -> Tensor:
    """argmin_R ‖T − L·R‖²_F = (Lᵀ·L)⁻¹·Lᵀ·T, with the same ridge."""
    gram_BRR = thin_product(left_BOR.mT, left_BOR)
    return _ridge_solve(gram_BRR, thin_product(left_BOR.mT, target_BOI))


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
