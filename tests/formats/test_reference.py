"""Bit-for-bit agreement with the NumPy restatement in reference.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loraq.formats import FORMATS, dequantize, fake_quantize, get_format, quantize
from loraq.formats.scales import e8m0_from_absmax
from tests.formats import reference

BLOCK_NAMES = [n for n, s in FORMATS.items() if s.family in ("int", "uint", "mxint", "mxfp")]
RULES = ("floor", "ceil", "even", "rceil")


def samples(seed: int = 0) -> torch.Tensor:
    """Rows of very different magnitudes, with ties, zeros, outliers and a short last block."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(14, 150, generator=generator)
    x = x * torch.exp2(torch.randint(-9, 10, (14, 1), generator=generator).float())
    x[3] = torch.randint(-15, 16, (150,), generator=generator) / 2  # many exact ties
    x[4] = torch.randint(-63, 64, (150,), generator=generator) / 8
    x[5, :64] = 0
    x[6] *= (torch.rand(150, generator=generator) < 0.05) * 100.0 + 0.01
    x[7] = x[7].bfloat16().float()
    x[8] = torch.exp2(torch.randint(-12, 5, (150,), generator=generator).float())
    x[9, 140:] = 0
    return x


def assert_same(x: torch.Tensor, fmt, expected: np.ndarray) -> None:
    wanted = torch.from_numpy(expected + np.float32(0))  # -0 counts as 0
    stored = dequantize(quantize(x, fmt))
    assert torch.equal(stored, wanted), fmt.label
    assert torch.equal(fake_quantize(x, fmt), wanted), fmt.label


@pytest.mark.parametrize("name", BLOCK_NAMES)
def test_block_formats(name):
    mx = name.startswith("mx")
    for block in (get_format(name).block, 7, 150):
        for rule in RULES if mx else ("floor",):
            fmt = get_format(name, block=block, exponent=rule if mx else None)
            x = samples().abs() if name == "uint4" else samples()
            expected = np.stack([reference.fake_row(r, name, block, rule) for r in x.numpy()])
            assert_same(x, fmt, expected)


def test_uint4_makes_negative_values_zero():
    fmt = get_format("uint4", block=8)
    x = samples()
    expected = np.stack([reference.fake_row(row, "uint4", 8) for row in x.numpy()])
    assert_same(x, fmt, expected)
    assert float(fake_quantize(-x.abs(), fmt).abs().max()) == 0


@pytest.mark.parametrize("name", ["int4", "int6", "int8", "uint4"])
def test_one_bit_beside_every_tie(name):
    """fp32 division by a 16-bit scale decides like exact arithmetic right beside the ties."""
    largest = get_format(name).element.maximum_code
    scales = torch.rand(200, 1, generator=torch.Generator().manual_seed(5)).half().float()
    ties = (torch.arange(largest) + 0.5) * scales  # exact: few enough bits
    down, up = (torch.nextafter(ties, torch.full_like(ties, limit)) for limit in (0.0, 1e9))
    x = torch.cat([ties, down, up, largest * scales], -1)
    expected = np.stack([reference.fake_row(row, name, x.shape[1]) for row in x.numpy()])
    assert_same(x, get_format(name, block=x.shape[1]), expected)
    steps = torch.arange(largest).expand(200, -1)
    codes = fake_quantize(x, get_format(name, block="channel")) / scales
    assert torch.equal(codes[:, largest : 2 * largest].round(), steps.float())
    assert torch.equal(codes[:, 2 * largest : 3 * largest].round(), steps + 1.0)


@pytest.mark.parametrize("name", ["int4", "int6", "int8", "uint4"])
def test_per_channel_and_per_tensor(name):
    x = samples().abs()
    rows = np.stack([reference.fake_row(row, name, 150) for row in x.numpy()])
    assert_same(x, get_format(name, block="channel"), rows)
    flat = reference.fake_row(x.flatten().numpy(), name, x.numel())
    assert_same(x, get_format(name, block="tensor"), flat.reshape(x.shape))


@pytest.mark.parametrize("tensor_scale", ["tensor", "token", "fixed", "fixed_floor"])
def test_nvfp4(tensor_scale):
    x = samples()
    x[10] *= 1e-3 / x[10].abs().max()  # blocks that `fixed` makes zeros
    array = x.numpy()
    if tensor_scale == "tensor":
        scales = [reference.nvfp4_tensor_scale(array)] * len(array)
    elif tensor_scale == "token":
        scales = [reference.nvfp4_tensor_scale(row) for row in array]
    else:
        scales = [np.float32(1)] * len(array)
    least = 2.0**-9 if tensor_scale == "fixed_floor" else 0.0
    expected = [
        reference.nvfp4_row(row, scale, least=least)
        for row, scale in zip(array, scales, strict=True)
    ]
    assert tensor_scale == "tensor" or bool(expected[10].any()) == (tensor_scale != "fixed")
    assert_same(x, get_format("nvfp4", tensor_scale=tensor_scale), np.stack(expected))


@pytest.mark.parametrize("name", [n for n in BLOCK_NAMES if n.startswith("mx")])
@pytest.mark.parametrize("rule", RULES)
def test_shared_exponents_at_their_borders(name, rule):
    element = get_format(name).element
    fractions = {1.0, 1.5, 1.75, 1.875, 1.9375, 1.96875, 1.984375, 2 - 2**-8, 2 - 2**-9}
    exact = np.array(sorted(fractions), np.float32)
    near = np.concatenate([exact, np.nextafter(exact, np.float32(4)), np.nextafter(exact, 0)])
    exponents = [-126, -125, -100, -20, -1, 0, 1, 7, 8, 15, 100, 126, 127]
    absmax = np.array([np.ldexp(float(f), e) for f in near.astype(np.float32) for e in exponents])
    absmax = absmax[(absmax >= 2.0**-126) & (absmax < 2.0**127.99)].astype(np.float32)
    got = e8m0_from_absmax(torch.from_numpy(absmax), element, rule).numpy().astype(int) - 127
    wanted = [
        reference.shared_exponent(float(a), element.maximum, element.mantissa_bits, rule)
        for a in absmax
    ]
    assert np.array_equal(got, wanted)
