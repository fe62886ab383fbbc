"""Properties that hold for every input, tested with hypothesis."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loraq.formats import FORMATS, dequantize, fake_quantize, get_format, quantize, stored_bits
from loraq.formats.blocks import block_length, to_blocks
from loraq.formats.elements import FloatElement
from loraq.formats.scales import e8m0_from_absmax, scale_values

BLOCK_NAMES = [name for name, spec in FORMATS.items() if spec.family != "float"]
MX_NAMES = [name for name in BLOCK_NAMES if name.startswith("mx")]
TOKEN_NAMES = [name for name in BLOCK_NAMES if name != "nvfp4"]
SETTINGS = settings(max_examples=25, deadline=None, derandomize=True)
numbers = st.floats(-1e4, 1e4, width=32) | st.integers(-64, 64).map(lambda i: i / 4)


@st.composite
def draw_tensors(draw) -> torch.Tensor:
    """Small shapes; values from a set that hypothesis draws and shrinks."""
    shape = (*draw(st.lists(st.integers(1, 3), max_size=2)), draw(st.integers(1, 70)))
    palette = torch.tensor(draw(st.lists(numbers, min_size=1, max_size=12)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = palette[torch.randint(len(palette), shape, generator=generator)]
    return x * torch.randn(shape, generator=generator) if draw(st.booleans()) else x


tensors = draw_tensors()
blocks = st.sampled_from([1, 3, 16, 32, "channel"])
rules = st.sampled_from(["floor", "ceil", "even", "rceil"])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.view(torch.int32), b.view(torch.int32))


def make(name, block, rule="floor", **options):
    return get_format(name, block=block, exponent=rule if name in MX_NAMES else None, **options)


@pytest.mark.parametrize("name", BLOCK_NAMES)
@SETTINGS
@given(x=tensors, block=blocks, rule=rules, clip=st.sampled_from(["none", "none", "mse"]))
def test_fake_and_packed_paths_give_the_same_bits_and_the_size_is_as_counted(
    name, x, block, rule, clip
):
    fmt = make(name, block, rule, clip=clip)
    stored = quantize(x, fmt)
    assert same_bits(fake_quantize(x, fmt), dequantize(stored))
    assert stored_bits(tuple(x.shape), fmt) == 8 * stored.nbytes
    assert all(tensor.is_contiguous() for tensor in stored.tensors().values())


@pytest.mark.parametrize("name", BLOCK_NAMES)
@SETTINGS
@given(x=tensors, block=blocks, rule=rules)
def test_quantising_twice_changes_nothing(name, x, block, rule):
    x = torch.where(x.abs() < 1, torch.zeros(()), x)  # keeps 16-bit and E4M3 scales normal
    x = x.abs() if name == "uint4" else x
    fixed = {"tensor_scale": "fixed"} if name == "nvfp4" else {}
    fmt = make(name, block, rule, **fixed)
    once = fake_quantize(x, fmt)
    assert same_bits(fake_quantize(once, fmt), once)


@pytest.mark.parametrize("name", BLOCK_NAMES)
@SETTINGS
@given(x=tensors, rule=rules)
def test_monotone_within_a_block(name, x, rule):
    row = x.flatten()
    result = fake_quantize(row, make(name, "channel", rule))
    assert (result[row.argsort()].diff() >= 0).all()


@pytest.mark.parametrize("name", BLOCK_NAMES)
@SETTINGS
@given(x=tensors, block=blocks, rule=rules, power=st.integers(-3, 3))
def test_powers_of_two_pass_through(name, x, block, rule, power):
    x = torch.where(x.abs() < 1, torch.zeros(()), x)
    fmt = make(name, block, rule)
    assert same_bits(fake_quantize(x * 2.0**power, fmt), fake_quantize(x, fmt) * 2.0**power)


@pytest.mark.parametrize("name", BLOCK_NAMES)
@SETTINGS
@given(x=tensors, rule=rules)
def test_error_is_at_most_half_a_step(name, x, rule):
    x = x.abs() if name == "uint4" else x
    row = x.flatten()
    fmt = make(name, "channel", rule)
    stored = quantize(row, fmt)
    scale = scale_values(stored.scale, fmt, stored.tensor_scale).double()
    element, scaled = fmt.element, row.double().abs() / scale
    if float(scale) == 0:
        assert float(row.abs().max()) < 1e-5
        return
    inside = scaled <= element.maximum
    if isinstance(element, FloatElement):
        exponent = torch.frexp(scaled)[1].clamp(min=element.minimum_exponent + 1) - 1
        step = torch.exp2((exponent - element.mantissa_bits).double())
    else:
        step = torch.full_like(scaled, 2.0**-element.fraction_bits)
    error = (dequantize(stored).double() - row.double()).abs() / scale
    assert (error[inside] <= step[inside] / 2 * (1 + 1e-6)).all()
    beyond = scaled[~inside] - element.maximum  # saturated: the error is what exceeds the maximum
    assert (error[~inside] <= beyond * (1 + 1e-6) + 1e-6 * element.maximum).all()


@pytest.mark.parametrize("name", MX_NAMES)
@SETTINGS
@given(x=tensors, block=blocks, rule=st.sampled_from(["ceil", "rceil"]))
def test_ceil_and_rceil_never_saturate(name, x, block, rule):
    fmt = make(name, block, rule)
    block = block_length(fmt, x.shape[-1])
    scale = scale_values(quantize(x, fmt).scale, fmt)
    assert (to_blocks(x, block).abs().amax(-1) <= scale * fmt.element.maximum).all()


FP32_MAXIMUM = torch.finfo(torch.float32).max


def exact_exponent(absmax: Fraction, element, rule: str) -> int:
    """The rule in fractions, by search; capped so that no decoded value exceeds fp32."""
    if rule == "rceil":
        wanted = next(e for e in range(-160, 160) if Fraction(element.maximum) * power(e) >= absmax)
        return max(-127, min(127 - element.maximum_exponent, wanted))
    e = next(e for e in range(-126, 129) if absmax < power(e + 1))
    if rule == "ceil":
        e += absmax > power(e)
    elif rule == "even":
        unit = power(e) / 2**element.mantissa_bits
        e += round(absmax / unit) * unit == power(e + 1)  # rounds ties to even
    return max(-127, min(127, e) - element.maximum_exponent)


def power(e: int) -> Fraction:
    return Fraction(2) ** e


@pytest.mark.parametrize("rule", ["floor", "ceil", "even", "rceil"])
@pytest.mark.parametrize("name", MX_NAMES)
@SETTINGS
@given(absmax=st.floats(2.0**-126, FP32_MAXIMUM, width=32))
@example(absmax=FP32_MAXIMUM)
@example(absmax=2.0**127)
@example(absmax=1.75 * 2.0**127)
@example(absmax=2.0**-126)
def test_shared_exponents_equal_those_of_exact_fractions(name, rule, absmax):
    element = get_format(name).element
    found = int(e8m0_from_absmax(torch.tensor([absmax]), element, rule)) - 127
    assert found == exact_exponent(Fraction(absmax), element, rule)


@pytest.mark.parametrize("name", TOKEN_NAMES)
@SETTINGS
@given(x=tensors, block=blocks)
def test_rows_are_independent(name, x, block):
    fmt = make(name, block)
    assert fmt.per_token
    whole = fake_quantize(x, fmt).reshape(-1, x.shape[-1])
    codes = quantize(x, fmt).codes
    codes = codes.reshape(-1, codes.shape[-1])
    for index, row in enumerate(x.reshape(-1, x.shape[-1])):
        assert same_bits(fake_quantize(row, fmt), whole[index])
        assert torch.equal(quantize(row, fmt).codes, codes[index])


@pytest.mark.parametrize("tensor_scale", ["token", "fixed"])
def test_nvfp4_rows_of_activations_are_independent(tensor_scale):
    fmt = get_format("nvfp4", tensor_scale=tensor_scale)
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 6)[:, None]
    whole = fake_quantize(x, fmt)
    assert fmt.per_token and not get_format("nvfp4").per_token
    assert all(same_bits(fake_quantize(row, fmt), whole[i]) for i, row in enumerate(x))
