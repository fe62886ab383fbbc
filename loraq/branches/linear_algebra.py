"""Truncated SVDs of batches of weights, and the least-squares steps of alternation.

Shapes: w_BOI batch × out × in; factors left_BOR and right_BRI with P = left·right.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraq.utils import batch_invariance

EXACT_WIDTH = 768
"""Largest shorter side with an exact SVD; above it, subspace iteration approximates the SVD."""
ITERATIONS = 8
"""Subspace iterations from a random start."""


def svd_is_exact(w_BOI: Tensor) -> bool:
    """Whether `truncated_svd` uses a full decomposition for matrices of this size."""
    return min(w_BOI.shape[-2:]) <= EXACT_WIDTH


def truncated_svd(w_BOI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-r factors L = U√S, R = √S Vᵀ in the Frobenius norm (Eckart–Young), in w's dtype.

    For a shorter side above EXACT_WIDTH the error exceeds the optimum by some tenths of a per cent:
    a full decomposition takes cubic time, which adds up to minutes per model.
    """
    tall = w_BOI.shape[-2] >= w_BOI.shape[-1]
    find = _eigenvectors if svd_is_exact(w_BOI) else _leading
    vectors, w = find(w_BOI.mT if tall else w_BOI, rank), w_BOI.double()
    left, right = _from_right(w, vectors) if tall else _from_left(w, vectors)
    return left.to(w_BOI.dtype), right.to(w_BOI.dtype)


def tracked_svd(w_BOI: Tensor, rank: int, projection_BKN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Approximate `truncated_svd` of a matrix that changes little between calls, in w's dtype.

    One subspace iteration per call, started from the previous call's projection (at first
    `first_image`). Returns L, R and the next projection. N is the longer side, M the
    shorter, K slightly more than the rank.
    """
    tall = w_BOI.shape[-2] >= w_BOI.shape[-1]
    a_BNM = w_BOI if tall else w_BOI.mT
    v_BKM = torch.linalg.qr(thin_product(projection_BKN, a_BNM).mT).Q.mT
    projection_BKN = thin_product(v_BKM, a_BNM.mT)
    gram_BKK = thin_product(projection_BKN, projection_BKN.mT).double()
    turn_BRK = torch.linalg.eigh(gram_BKK).eigenvectors[..., -rank:].flip(-1).mT.to(w_BOI)
    us_BRN, v_BRM = thin_product(turn_BRK, projection_BKN), thin_product(turn_BRK, v_BKM)
    root_BR = us_BRN.norm(dim=-1).clamp_min(torch.finfo(w_BOI.dtype).tiny).sqrt()[..., None]
    long, short = us_BRN / root_BR, v_BRM * root_BR
    return (long.mT, short, projection_BKN) if tall else (short.mT, long, projection_BKN)


def first_image(w_BOI: Tensor, left_BOR: Tensor, right_BRI: Tensor) -> Tensor:
    """The start of `tracked_svd`: w projected on its factors and on some random directions."""
    tall = left_BOR.shape[-2] >= right_BRI.shape[-1]
    start_BMR = right_BRI.mT if tall else left_BOR
    (height, rank), sides = start_BMR.shape[-2:], left_BOR.shape[-2] + right_BRI.shape[-1]
    more = _block_columns(height, sides - height, rank) - rank
    basis_BMK = torch.linalg.qr(torch.cat([start_BMR, _random(start_BMR, more)], dim=-1)).Q
    return thin_product(basis_BMK.mT, w_BOI.mT if tall else w_BOI)


def thin_product(x_BKN: Tensor, w_BNM: Tensor) -> Tensor:
    """X·W for a small K, or a small N, with the faster library for this device.

    oneDNN multiplies one matrix of the batch at a time, so that no unit depends on its batch.
    """
    if x_BKN.dtype != torch.float32 or not batch_invariance.use_onednn(x_BKN.device.type):
        return x_BKN @ w_BNM
    pairs = zip(x_BKN.contiguous(), w_BNM.mT, strict=True)
    products = [batch_invariance.onednn_product(x, w) for x, w in pairs]
    return products[0][None] if len(products) == 1 else torch.stack(products)


def _from_right(w_BOI: Tensor, v_BIR: Tensor) -> tuple[Tensor, Tensor]:
    """L, R of W projected on its right singular vectors."""
    us_BOR = w_BOI @ v_BIR
    s_BR = us_BOR.norm(dim=-2).clamp_min(torch.finfo(w_BOI.dtype).tiny)
    return us_BOR / s_BR.sqrt()[..., None, :], (v_BIR * s_BR.sqrt()[..., None, :]).mT


def _from_left(w_BOI: Tensor, u_BOR: Tensor) -> tuple[Tensor, Tensor]:
    """L, R of W projected on its left singular vectors."""
    sv_BRI = u_BOR.mT @ w_BOI
    s_BR = sv_BRI.norm(dim=-1).clamp_min(torch.finfo(w_BOI.dtype).tiny)
    return u_BOR * s_BR.sqrt()[..., None, :], sv_BRI / s_BR.sqrt()[..., :, None]


def _eigenvectors(a_BMN: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors (B, M, r) of A, as eigenvectors of A·Aᵀ, float64.

    Takes a quarter of the time of a full SVD. Squaring the condition number loses only directions
    below 1e-8 of the largest singular value, which do not matter for a rank-r approximation.
    """
    a = a_BMN.double()
    return torch.linalg.eigh(a @ a.mT).eigenvectors[..., -rank:].flip(-1)


def _leading(a_BMN: Tensor, rank: int) -> Tensor:
    """`_eigenvectors` approximated by randomised subspace iteration (Halko et al. 2011, alg. 4.4).

    Iterates in float32: the vectors need not be exact to be orthonormal.
    """
    a = a_BMN.float()
    height, width = a.shape[-2:]
    u_BMK = torch.linalg.qr(_random(a, _block_columns(height, width, rank))).Q
    for _ in range(ITERATIONS):
        projection_BKN = thin_product(u_BMK.mT, a)
        u_BMK = torch.linalg.qr(thin_product(projection_BKN, a.mT).mT).Q
    turn_BKR = _eigenvectors(thin_product(u_BMK.mT, a), rank)
    return torch.linalg.qr(u_BMK.double() @ turn_BKR).Q


def _block_columns(height: int, width: int, rank: int) -> int:
    """Columns of the iterated block: oversampled, so that the leading `rank` converge faster."""
    return min(height, width, rank + max(8, rank // 4))


def _random(like_BMN: Tensor, columns: int) -> Tensor:
    """(B, M, columns), equal for every matrix, so that a unit does not depend on its batch."""
    g = torch.Generator().manual_seed(0)
    start_MK = torch.randn(like_BMN.shape[-2], columns, generator=g).to(like_BMN)
    return start_MK.expand(*like_BMN.shape[:-2], -1, -1)


def solve_left(target_BOI: Tensor, right_BRI: Tensor) -> Tensor:
    """argmin_L ‖T − L·R‖²_F = T·Rᵀ·(R·Rᵀ)⁻¹, with a relative ridge of 1e-7 for rank deficiency."""
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
    # the ridge makes it solvable; without a check, the host need not wait for a GPU
    solution_BRN, _ = torch.linalg.solve_ex(gram + 1e-7 * mean * eye, rhs_BRN.double())
    return solution_BRN.to(rhs_BRN.dtype)


def balance(left_BOR: Tensor, right_BRI: Tensor, split: float = 0.5) -> tuple[Tensor, Tensor]:
    """Rescale each rank-one term of size s_r = ‖L_r‖·‖R_r‖ to norms s^split and s^(1−split).

    The product does not change. split=0.5 gives ‖L_r‖ = ‖R_r‖ as in L = U√S, R = √SVᵀ; with split=0
    the singular values are in R.
    """
    l_BR, r_BR = left_BOR.norm(dim=-2), right_BRI.norm(dim=-1)
    alive = (l_BR > 0) & (r_BR > 0)
    if split == 0.5:  # one square root instead of two: alternation is sensitive to the last bits
        ratio = (r_BR / l_BR.clamp_min(1e-30)).sqrt()
    else:
        ratio = r_BR.clamp_min(1e-30).pow(split) / l_BR.clamp_min(1e-30).pow(1 - split)
    ratio = torch.where(alive, ratio, torch.ones_like(l_BR))
    return left_BOR * ratio[:, None, :], right_BRI / ratio[..., None]


def root_and_inverse(second_BII: Tensor) -> tuple[Tensor, Tensor]:
    """S = H^½ and S⁻¹ for second moments H (B, I, I), symmetric, float32.

    Eigenvalues below 1e-6 of the mean are raised to it: calibration does not determine these
    directions, and an unbounded S⁻¹ would move all error there.
    """
    values_BI, vectors_BII = torch.linalg.eigh(second_BII.double())
    floor = 1e-6 * values_BI.mean(-1, keepdim=True).clamp_min(1e-30)
    root_BI = values_BI.clamp_min(floor).sqrt()
    root = (vectors_BII * root_BI[:, None, :]) @ vectors_BII.mT
    inverse = (vectors_BII / root_BI[:, None, :]) @ vectors_BII.mT
    return root.float(), inverse.float()


def random_rotation(rank: int, generator: torch.Generator) -> Tensor:
    """A Haar-random orthogonal T (r × r), float32; L·Tᵀ and T·R have the product L·R."""
    q, r = torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).float()
