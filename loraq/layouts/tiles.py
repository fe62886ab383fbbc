"""The tile orders of nunchaku's kernels: a matrix as the registers of tensor cores read it.

Codes, scales, vectors and factors are each permuted in a fixed way. The rows and columns of a
matrix are split into axes, and the axes are stored in another order: `Tiles` is this pair.
N: out, K: in, R: rank, G: groups of a row. Sizes must be multiples of the tiles, see `padded`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from loraq.errors import LoraqError

TILE = 128
"""N and K are multiples of this in the packed tensors; codes of the padding are 0."""
RANK_TILE = 16


@dataclass(frozen=True)
class Tiles:
    """The axes that rows and columns are split into, and the order in which they are stored.

    rows, columns: sizes of the axes after the first, whose size follows from the matrix.
    order: axes of (first, *rows, first, *columns), from the slowest to the fastest.
    transposed: whether the stored tensor has the shape (columns, rows) instead of (rows, columns).
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    order: tuple[int, ...]
    transposed: bool = False

    def pack(self, matrix: Tensor) -> Tensor:
        """The stored tensor of a matrix; LoraqError unless whole tiles fill the matrix."""
        stored_shape = tuple(reversed(matrix.shape)) if self.transposed else tuple(matrix.shape)
        tiles = matrix.reshape(self._axes(tuple(matrix.shape)))
        return tiles.permute(self.order).reshape(stored_shape)

    def unpack(self, stored: Tensor) -> Tensor:
        """The inverse of `pack`."""
        shape = tuple(reversed(stored.shape)) if self.transposed else tuple(stored.shape)
        axes = self._axes(shape)
        inverse = [self.order.index(axis) for axis in range(len(axes))]
        return stored.reshape([axes[i] for i in self.order]).permute(inverse).reshape(shape)

    def _axes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        row, column = math.prod(self.rows), math.prod(self.columns)
        if len(shape) != 2 or shape[0] % row or shape[1] % column:
            raise LoraqError(
                f"A matrix of shape {shape} does not consist of tiles of {row} × {column}. Pad it."
            )
        return (shape[0] // row, *self.rows, shape[1] // column, *self.columns)


CODES = Tiles((8, 2, 8), (2, 4, 4), (0, 4, 1, 3, 6, 2, 5, 7))
"""4-bit codes (N, K/2) uint8, the even column in the low nibble: words of 8 codes are permuted."""
GROUP_SCALES = Tiles((8, 2, 4, 2), (), (0, 5, 1, 3, 2, 4), transposed=True)
"""Scales (N, G) of INT4 groups of 64, stored (G, N)."""
MICRO_SCALES = {
    16: Tiles((4, 4, 8), (4,), (0, 4, 3, 2, 1, 5), transposed=True),
    32: Tiles((4, 4, 8), (2,), (0, 4, 3, 2, 1, 5), transposed=True),
}
"""Scales (N, G) of NVFP4 (blocks of 16) and MXFP4 (blocks of 32), stored (G, N)."""
UP = Tiles((2, 8), (2, 4, 2), (0, 3, 2, 5, 1, 4, 6))
"""The branch's second factor (N, R)."""
DOWN = Tiles((2, 8), (2, 4, 2), (3, 0, 2, 5, 1, 4, 6), transposed=True)
"""The branch's first factor (R, K), stored (K, R)."""


def pack_vector(vector: Tensor) -> Tensor:
    """A vector over N or K (bias, smoothing, a scale per row): the order of one group's scales."""
    return GROUP_SCALES.pack(vector[:, None])[0]


def unpack_vector(stored: Tensor) -> Tensor:
    """The inverse of `pack_vector`."""
    return GROUP_SCALES.unpack(stored[None])[:, 0]


def padded(x: Tensor, multiples: tuple[int, ...], value: float = 0) -> Tensor:
    """x with each of its last axes padded with `value` to a multiple.

    Codes and factors are padded with 0; scales, smoothing and biases with 1 (as a byte of E8M0
    127, of E4M3 0x38), as other packers pad them.
    """
    extra = [-size % multiple for size, multiple in zip(x.shape, multiples, strict=True)]
    if not any(extra):
        return x
    sides = [side for after in reversed(extra) for side in (0, after)]
    raw = x.view(torch.uint8) if x.element_size() == 1 else x  # float8 has no padding
    return pad(raw, sides, value=value).view(x.dtype)
