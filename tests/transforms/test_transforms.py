"""Transforms are exact: x̃·W̃ᵀ + bias̃ = x·Wᵀ + bias up to rounding, for every combination."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraq.errors import LoraqError
from loraq.transforms.hadamard import (
    hadamard_matrix,
    largest_block,
    random_signs,
    regular_matrix,
    regular_order,
    regular_signs,
    rotate,
    rotate_back,
)
from loraq.transforms.input_transform import GELU_SHIFT, InputTransform, pack_bits, unpack_bits
from loraq.transforms.smoothing import candidates, grid, smoothing_scale

WIDTHS = st.sampled_from([2, 6, 48, 64, 96, 320, 384, 1152])


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=40, deadline=None)
@given(WIDTHS, st.booleans(), st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_every_combination_leaves_the_layer_unchanged(width, smooth, rotated, shifted, seed):
    g = _generator(seed)
    x = torch.randn(7, width, generator=g) * torch.randn(width, generator=g).exp()
    w, bias = torch.randn(5, width, generator=g), torch.randn(5, generator=g)
    scale = smoothing_scale(x.abs().amax(0), w.abs().amax(0), 0.5, 0.5) if smooth else None
    signs = random_signs(width, g) if rotated else None
    block = largest_block(width, 64) if rotated else 0
    t = InputTransform(scale, signs, block, GELU_SHIFT if shifted else 0.0)
    y = x.double() @ w.double().T + bias.double()
    out = t.input(x) @ t.weight(w).T + t.bias(bias, w)
    bound = 2e-6 * (x.abs() + GELU_SHIFT).double() @ w.abs().double().T + 1e-5
    assert ((out - y).abs() <= bound * (1 + rotated * block)).all()
    assert torch.allclose(t.weight_back(t.weight(w)), w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", [2, 4, 64, 256])
def test_hadamard_is_orthogonal_and_symmetric(block):
    h = hadamard_matrix(block).double()
    assert torch.allclose(h @ h, torch.eye(block, dtype=torch.float64), atol=1e-6)
    assert torch.equal(h, h.T)


def test_rotation_spreads_an_outlier_and_comes_back():
    x = torch.zeros(1, 128)
    x[0, 5] = 8.0
    signs = random_signs(128, _generator(0))
    y = rotate(x, signs, 64)
    assert torch.allclose(y[0, :64].abs(), torch.ones(64))
    assert (y[0, 64:] == 0).all()
    assert torch.allclose(rotate_back(y, signs, 64), x, atol=1e-6)


def test_the_block_divides_the_width_and_an_invalid_one_raises():
    assert largest_block(5600, 64) == 32
    assert largest_block(384, 256) == 128
    with pytest.raises(LoraqError, match="power of two"):
        largest_block(384, 48)
    with pytest.raises(LoraqError, match="even width"):
        largest_block(75, 64)


@given(st.integers(1, 70), st.integers(0, 2**31))
def test_packed_bits_round_trip(count, seed):
    bits = torch.rand(count, generator=_generator(seed)) < 0.5
    packed = pack_bits(bits)
    assert packed.dtype == torch.uint8 and len(packed) == -(-count // 8)
    assert torch.equal(unpack_bits(packed, count), bits)


def test_stored_tensors_round_trip():
    g = _generator(3)
    scale = smoothing_scale(torch.rand(96, generator=g), torch.rand(96, generator=g), 0.3, 0.7)
    t = InputTransform(scale, random_signs(96, g), 32, 0.0)
    back = InputTransform.from_tensors(t.tensors(), 96, 32, 0.0)
    x = torch.randn(4, 96, generator=g)
    assert torch.equal(back.input(x), t.input(x))
    assert t.nbytes == 96 * 2 + 96 // 8


def test_smoothing_grid_is_svdquants():
    grid_points = candidates()
    assert len(grid_points) == 39 and grid_points[0] == (0.0, 0.0)
    assert sum(beta == 0 for _, beta in grid_points) == 20
    x, w = torch.rand(2, 9, 16) + 0.1, torch.rand(2, 5, 16) + 0.1
    x[0, :, 3] = 0  # a dead channel keeps its scale
    scales = dict(grid(x, w))
    assert torch.equal(scales[(0.0, 0.0)], torch.ones(2, 16))
    expected = x.abs().amax(1) ** 0.5 / w.abs().amax(1) ** 0.5
    assert torch.allclose(scales[(0.5, 0.5)][1], expected[1], rtol=2**-8)
    assert scales[(0.5, 0.5)][0, 3] == 1


@pytest.mark.parametrize("block", [4, 16, 64])
def test_regular_signs_make_a_regular_hadamard_matrix_up_to_the_order_of_channels(block):
    h, signs = regular_matrix(block), regular_signs(128, block)
    assert torch.allclose(h @ h, torch.eye(block), atol=1e-6) and torch.equal(h, h.T)
    assert torch.allclose(h.sum(1), torch.ones(block))  # no channel collects the block's mean
    x = torch.randn(3, 128, generator=_generator(0))
    order = regular_order(signs, block)
    assert order is not None
    places, flips = order
    mine = rotate(x, signs, block)[:, places] * (1 - 2 * flips.int())
    theirs = (x.unflatten(-1, (-1, block)) @ h).flatten(-2)
    assert torch.allclose(mine, theirs, atol=1e-5)


def test_random_signs_are_not_taken_for_regular_ones():
    assert regular_order(random_signs(128, _generator(0)), 64) is None
    assert regular_order(regular_signs(128, 16), 32) is None
    assert largest_block(96, 64, regular=True) == 16
    with pytest.raises(LoraqError, match="blocks of 4, 16, 64"):
        largest_block(6, 64, regular=True)
