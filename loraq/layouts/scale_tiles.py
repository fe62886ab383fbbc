"""Block scales in the tiles of cuBLAS: 128 rows by 4 blocks, padded with zeros.

In a tile, row r and column c lie at row r % 32, place 4·(r // 32) + c of 32 × 16; tiles are stored
row by row. Letters: O rows, G blocks of a row.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad

ROWS, COLUMNS = 128, 4


def tiled_shape(rows: int, columns: int) -> tuple[int, int]:
    """The shape of the stored tensor: both axes rounded up to tiles."""
    return rows + -rows % ROWS, columns + -columns % COLUMNS


def to_tiles(scales_OG: Tensor) -> Tensor:
    """(O, G) → the same bytes in tiles; of a type with one byte."""
    rows, columns = tiled_shape(*scales_OG.shape)
    extra = (0, columns - scales_OG.shape[1], 0, rows - scales_OG.shape[0])
    blocks = pad(scales_OG, extra).view(rows // ROWS, 4, 32, columns // COLUMNS, COLUMNS)
    return blocks.permute(0, 3, 2, 1, 4).reshape(rows, columns)


def from_tiles(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse: (O, G) = (rows, columns) without the padding."""
    down, across = (size // step for size, step in zip(tiles.shape, (ROWS, COLUMNS), strict=True))
    blocks = tiles.view(down, across, 32, 4, COLUMNS).permute(0, 3, 2, 1, 4)
    return blocks.reshape(tiles.shape)[:rows, :columns].contiguous()
