"""A float64 reference implementation of SVDQuant, one unit at a time, from its description alone.

Deliberately slow and direct: nothing here is shared with the library, not even its formats. Only
the number format itself is defined on float32, which is what a quantiser reads. That matters: one
scale that falls to the other side, and ten rounds of alternation later most codes differ.
Shapes: x_TI calibration rows as the layer's main path reads them (shifted where it is), w_OI.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ALPHAS = [i / 20 for i in range(1, 20)]
GRID = [(0.0, 0.0), *[(a, 0.0) for a in ALPHAS], *[(a, 1 - a) for a in ALPHAS]]

Exponents = tuple[float, float]
Decompose = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def int4(x: Tensor, block: int, unsigned: bool = False) -> Tensor:
    """absmax / 7 (or max / 15 unsigned) of float32 per group, scale in fp16, ties to even."""
    low, top = (0, 15) if unsigned else (-7, 7)
    blocks = x.float().unflatten(-1, (-1, block))
    scale = (blocks.abs().amax(-1, keepdim=True) / top).half().float().clamp_min(1e-30)
    return (torch.round(blocks / scale).clamp(low, top) * scale).flatten(-2).double()


def full_svd(w_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U√S (O, R) and √S·Vᵀ (R, I) of the first `rank` terms, stored in fp16."""
    u, s, vh = torch.linalg.svd(w_OI, full_matrices=False)
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).half().double(), (root[:, None] * vh[:rank]).half().double()


def leading_svd(w_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`full_svd` by the leading eigenvectors of WᵀW or WWᵀ, in at most a quarter of the time."""
    from scipy.linalg import eigh

    if w_OI.shape[0] < w_OI.shape[1]:
        left, right = leading_svd(w_OI.T, rank)
        return right.T, left.T
    size = w_OI.shape[1]
    squares, v = eigh((w_OI.T @ w_OI).numpy(), subset_by_index=[size - rank, size - 1])
    v_IR, s_R = torch.from_numpy(v), torch.from_numpy(squares).sqrt()
    left, right = w_OI @ v_IR / s_R.sqrt(), s_R.sqrt()[:, None] * v_IR.T
    return left.half().double(), right.half().double()


@dataclass
class Layer:
    """One quantised unit: main weight, branch, smoothing, and the input's format."""

    main_OI: Tensor
    left_OR: Tensor
    right_RI: Tensor
    smooth_I: Tensor
    block: int
    unsigned: bool

    def output(self, x_TI: Tensor) -> Tensor:
        """y (T, O) without bias: 4-bit inputs times 4-bit weights, plus the branch in 16 bits."""
        xs = x_TI / self.smooth_I
        branch = (xs.half().double() @ self.right_RI.T).half().double() @ self.left_OR.T
        return int4(xs, self.block, self.unsigned) @ self.main_OI.T + branch


@dataclass
class Unit:
    """One unit's weight, inputs and settings. Scores are squared output errors ‖Y − Ŷ‖²_F."""

    x_TI: Tensor
    w_OI: Tensor
    rank: int
    block: int
    unsigned: bool

    def score(self, layer: Layer) -> float:
        return (layer.output(self.x_TI) - self.x_TI @ self.w_OI.T).square().sum().item()

    def smoothing(self, exponents: Exponents) -> Tensor:
        """s = xmax^α / wmax^β, stored in bfloat16."""
        alpha, beta = exponents
        s_I = self.x_TI.abs().amax(0) ** alpha / self.w_OI.abs().amax(0) ** beta
        return s_I.bfloat16().double()

    def round(self, main_OI: Tensor, s_I: Tensor, decompose: Decompose) -> Layer:
        """P = SVD_r(W·s − Q), then Q = int4(W·s − P)."""
        left, right = decompose(self.w_OI * s_I - main_OI, self.rank)
        main = int4(self.w_OI * s_I - left @ right, self.block)
        return Layer(main, left, right, s_I, self.block, self.unsigned)

    def judge_smoothing(self, decompose: Decompose = full_svd) -> dict[Exponents, float]:
        """Exponents → score, with a separate branch for every candidate."""
        nothing = torch.zeros_like(self.w_OI)
        return {e: self.score(self.round(nothing, self.smoothing(e), decompose)) for e in GRID}

    def alternate(self, exponents: Exponents) -> tuple[Layer, list[float]]:
        """(best layer, score of every round): from Q = 0 until a round gains nothing, at most 100.

        The last score is the round's that gained nothing; the best layer is of the one before.
        """
        s_I, best, scores = self.smoothing(exponents), None, []
        main = torch.zeros_like(self.w_OI)
        for _ in range(100):
            layer = self.round(main, s_I, full_svd)
            scores.append(self.score(layer))
            if best is not None and scores[-1] >= scores[-2]:
                break
            best, main = layer, layer.main_OI
        assert best is not None
        return best, scores
