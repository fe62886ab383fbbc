"""Exhaustive tests of the elements: every code, and rounding between every two neighbours."""

from __future__ import annotations

import pytest
import torch

from loraq.formats import FORMATS
from loraq.formats.elements import IntegerElement
from tests.formats import reference

ELEMENTS = {name: spec.element for name, spec in FORMATS.items() if spec.element is not None}


@pytest.mark.parametrize("name", ELEMENTS)
def test_encode_inverts_decode_for_every_finite_code(name):
    element = ELEMENTS[name]
    codes = torch.tensor(element.finite_codes, dtype=torch.uint8)
    values = element.decode(codes)
    assert values.isfinite().all()
    assert torch.equal(element.encode(values), codes)
    assert torch.equal(element.quantize(values.clone()), codes)
    assert float(values.abs().max()) == element.maximum


@pytest.mark.parametrize("name", ELEMENTS)
def test_number_of_finite_codes(name):
    element = ELEMENTS[name]
    never_written = {"mxfp8_e4m3": 2, "mxfp8_e5m2": 8}.get(name, 0)  # NaN and Inf
    if isinstance(element, IntegerElement) and element.signed:
        never_written = 1  # the most negative code
    assert len(set(element.finite_codes)) == 2**element.bits - never_written


@pytest.mark.parametrize("name", [n for n in ELEMENTS if n.startswith("mxfp")])
def test_float_values_against_the_reference_grid(name):
    element = ELEMENTS[name]
    grid = torch.from_numpy(reference.float_grid(name.split("_")[1])).float()
    assert torch.equal(element.decode(torch.arange(len(grid), dtype=torch.uint8)), grid)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("mxfp8_e4m3", torch.float8_e4m3fn), ("mxfp8_e5m2", torch.float8_e5m2)],
)
def test_fp8_bit_patterns_against_torch(name, dtype):
    codes = torch.arange(256, dtype=torch.uint8)
    ours, theirs = ELEMENTS[name].decode(codes), codes.view(dtype).float()
    assert torch.equal(ours.nan_to_num(nan=7e9), theirs.nan_to_num(nan=7e9))


def test_e2m1_values_are_those_of_the_standard():
    values = ELEMENTS["mxfp4_e2m1"].decode(torch.arange(16, dtype=torch.uint8))
    assert values[:8].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert torch.equal(values[8:], -values[:8])
    assert torch.signbit(values[8])


@pytest.mark.parametrize("name", ELEMENTS)
def test_rounding_between_all_neighbours(name):
    """Just below the middle down, just above it up, the middle to the even code."""
    element = ELEMENTS[name]
    grid = element.decode(torch.tensor(element.finite_codes, dtype=torch.uint8)).unique()
    low, high = grid[:-1], grid[1:]
    middle = (low + high) / 2  # exact: one more bit than the element has
    inf = torch.full_like(middle, float("inf"))
    assert torch.equal(element.round_(torch.nextafter(middle, -inf)), low)
    assert torch.equal(element.round_(torch.nextafter(middle, inf)), high)
    tied = element.round_(middle.clone())
    assert torch.equal(tied, torch.where(element.encode(low) % 2 == 0, low, high))
    assert torch.equal(element.round_(grid.clone()), grid)


@pytest.mark.parametrize("name", ELEMENTS)
def test_saturation_zeros_and_nan(name):
    element = ELEMENTS[name]
    top = element.maximum
    far = element.round_(torch.tensor([top * 1.5, 1e30, float("inf"), -1e30, float("-inf")]))
    low = 0.0 if name == "uint4" else -top
    assert far.tolist() == [top, top, top, low, low]
    assert element.round_(torch.tensor([float("nan")])).isnan().all()
    zeros = element.round_(torch.tensor([0.0, -0.0, 1e-30, -1e-30]))
    assert zeros.view(torch.int32).tolist() == [0, 0, 0, 0]


def test_float_codes_keep_the_sign_of_zero():
    codes = ELEMENTS["mxfp4_e2m1"].quantize(torch.tensor([-0.0, -0.2, 0.2, 0.0]))
    assert codes.tolist() == [8, 8, 0, 0]
