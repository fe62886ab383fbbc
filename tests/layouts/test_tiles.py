"""The packed tiles: unpack(pack) is the identity, and the bytes are those of other packers."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraq.errors import LoraqError
from loraq.layouts.tiles import (
    CODES,
    DOWN,
    GROUP_SCALES,
    MICRO_SCALES,
    UP,
    Tiles,
    pack_vector,
    padded,
    unpack_vector,
)
from tests.layouts.numbered import numbered

ORDERS = {
    "codes": (CODES, 128, 32),
    "group scales": (GROUP_SCALES, 128, 1),
    "micro scales of 16": (MICRO_SCALES[16], 128, 4),
    "micro scales of 32": (MICRO_SCALES[32], 128, 2),
    "down": (DOWN, 16, 16),
    "up": (UP, 16, 16),
}

# sha256 of the packed `numbered` matrices. tests/engines/test_tiles.py compares the same matrices
# with the packers of cache-dit 1.5.3 and auto-round 0.16.1.
GOLDEN = {
    "codes": "5039deed87c2bce0",
    "group scales": "df9c869dea58fdbf",
    "micro scales of 16": "92b62c7e82903c96",
    "micro scales of 32": "11b6f20a8e6d9608",
    "down": "eba4bc2da6e42289",
    "up": "f39ee985572fc874",
}


@pytest.mark.parametrize("name", ORDERS)
@settings(max_examples=20)
@given(rows=st.integers(1, 3), columns=st.integers(1, 5), half=st.booleans())
def test_unpacking_inverts_packing(name, rows, columns, half):
    tiles, row, column = ORDERS[name]
    matrix = numbered(rows * row, columns * column)
    if half:
        matrix = matrix.half()
    stored = tiles.pack(matrix)
    assert sorted(stored.shape) == sorted(matrix.shape)
    assert torch.equal(tiles.unpack(stored), matrix)


@settings(max_examples=4)
@given(tiles=st.integers(1, 4))
def test_vectors_are_unpacked(tiles):
    vector = torch.arange(tiles * 128).float()
    assert torch.equal(unpack_vector(pack_vector(vector)), vector)


@pytest.mark.parametrize("name", ORDERS)
def test_bytes_are_those_of_other_packers(name):
    tiles, row, column = ORDERS[name]
    stored = tiles.pack(numbered(3 * row, 4 * column))
    assert hashlib.sha256(stored.numpy().tobytes()).hexdigest()[:16] == GOLDEN[name]


def test_positions_of_a_code_and_a_factor():
    # By hand: n = 128a + 16b + 8c + d and k = 64e + 32f + 8g + h lie in word
    # ((((a·K/64 + e)·8 + b)·8 + d)·4 + g)·4 + 2c + f, nibble h.
    codes = torch.zeros(256, 64, dtype=torch.uint8)
    n, k = 128 + 16 * 5 + 8 + 3, 64 + 32 + 8 * 2 + 5
    codes[n, k // 2] = 0x90
    word = ((((1 * 2 + 1) * 8 + 5) * 8 + 3) * 4 + 2) * 4 + 2 * 1 + 1
    assert CODES.pack(codes).flatten().nonzero().tolist() == [[word * 4 + 2]]


@pytest.mark.parametrize(("rows", "columns"), [(127, 32), (128, 31)])
def test_incomplete_tiles_are_refused(rows, columns):
    with pytest.raises(LoraqError, match=rf"\({rows}, {columns}\).*128 × 32.*Pad"):
        CODES.pack(torch.zeros(rows, columns, dtype=torch.uint8))


def test_padding_fills_the_last_rows_and_columns():
    ones = padded(torch.zeros(2, 3), (4, 2), 1.0)
    assert ones.shape == (4, 4)
    assert ones[:2, :3].eq(0).all() and ones.sum() == 16 - 6
    scales = padded(torch.ones(1, 2).to(torch.float8_e4m3fn), (1, 4), 0x38)
    assert scales.dtype == torch.float8_e4m3fn and scales.float().tolist() == [[1.0] * 4]


def test_tiles_without_a_split_keep_the_order():
    x = numbered(4, 6)
    assert torch.equal(Tiles((), (), (0, 1)).pack(x), x)
