"""Rate–distortion references against closed forms, and against formats that cannot beat them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraq.errors import LoraqError
from loraq.formats import fake_quantize, get_format, stored_bits
from loraq.quantization.rate_distortion import (
    gaussian_limit,
    mean_limits,
    shannon_limit,
    spectral_limit,
)

LIMITS = (gaussian_limit, spectral_limit, shannon_limit)


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("bits", [0.5, 2.0, 4.25])
def test_on_independent_gaussians_all_three_agree(bits):
    """Within 1 %: a tall matrix, so that the sample covariance is nearly the identity."""
    w_OI = 0.02 * gaussian(16384, 16)
    for limit in LIMITS:
        assert limit(w_OI, bits) == pytest.approx(2**-bits, rel=0.01)


def test_a_laplacian_lies_below_the_gaussian_by_its_closed_form():
    """h = 1 + ½ ln 2 nats at unit variance, so the ratio to the Gaussian limit is √(e/π)."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(512, 512, generator=generator, dtype=torch.float64) - 0.5
    w_OI = 0.3 * uniform.sign() * torch.log1p(-2 * uniform.abs())
    ratio = shannon_limit(w_OI, 4) / gaussian_limit(w_OI, 4)
    assert ratio == pytest.approx(math.sqrt(math.e / math.pi), rel=0.01)


def test_water_filling_of_two_levels_by_hand():
    """λ = (16, 1): with ½·½ log2(16) = 1 bit per weight the large one reaches the small one."""
    w_OI = torch.zeros(8, 2)
    w_OI[0, 0], w_OI[1, 1] = 4.0, 1.0
    assert spectral_limit(w_OI, 1.0) == pytest.approx(math.sqrt(2 / 17), rel=1e-9)
    assert spectral_limit(w_OI, 0.5) == pytest.approx(math.sqrt((4 + 1) / 17), rel=1e-9)
    # above the point where both are active every further bit halves the error
    assert spectral_limit(w_OI, 3.0) == pytest.approx(math.sqrt(2 / 17) / 4, rel=1e-9)
    assert spectral_limit(w_OI.T, 3.0) == pytest.approx(spectral_limit(w_OI, 3.0), rel=1e-9)


def test_low_rank_structure_is_seen_by_the_spectrum_alone():
    low_rank = gaussian(1024, 8, seed=1) @ gaussian(8, 128, seed=2)
    w_OI = low_rank + 0.3 * gaussian(1024, 128, seed=3)
    assert spectral_limit(w_OI, 4) < 0.4 * gaussian_limit(w_OI, 4)
    assert shannon_limit(w_OI, 4) > 0.9 * gaussian_limit(w_OI, 4)


@pytest.mark.parametrize("rows,columns", [(256, 256), (1024, 256)])
def test_the_spectral_limit_of_white_matrices_is_marchenko_pasturs(rows, columns):
    """Marchenko–Pastur, γ = k/n: mean ln λ = −1 + (1 − 1/γ) ln(1 − γ), −1 at γ = 1."""
    gamma = columns / rows
    mean_log = -1.0 if gamma == 1 else -1 + (1 - 1 / gamma) * math.log(1 - gamma)
    expected = math.exp(mean_log / 2) * 2**-12.0
    assert spectral_limit(gaussian(rows, columns), 12) == pytest.approx(expected, rel=0.01)


def test_zero_bits_have_a_relative_error_of_1():
    w_OI = gaussian(4096, 32)
    assert gaussian_limit(w_OI, 0) == 1
    assert spectral_limit(w_OI, 0) == pytest.approx(1)
    assert shannon_limit(w_OI, 0) == pytest.approx(1, abs=0.01)
    assert shannon_limit(w_OI, 0) <= 1


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=st.integers(16, 40),
    columns=st.integers(16, 40),
    seed=st.integers(0, 99),
    rank=st.integers(1, 16),
    scale=st.floats(1e-3, 1e3),
    bits=st.floats(0, 10),
    more=st.floats(0.01, 4),
)
def test_more_bits_never_hurt_and_units_do_not_matter(rows, columns, seed, rank, scale, bits, more):
    w_OI = gaussian(rows, rank, seed) @ gaussian(rank, columns, seed + 1)
    for limit in LIMITS:
        here = limit(w_OI, bits)
        assert 0 <= here <= 1 + 1e-9
        assert limit(w_OI, bits + more) <= here
        assert limit(scale * w_OI, bits) == pytest.approx(here, rel=1e-4, abs=1e-7)
    # the memoryless Gaussian is the hardest of all
    assert spectral_limit(w_OI, bits) <= gaussian_limit(w_OI, bits) * (1 + 1e-9)
    assert shannon_limit(w_OI, bits) <= gaussian_limit(w_OI, bits)


@pytest.mark.parametrize("clip", ["none", "mse"])
@pytest.mark.parametrize("name", ["int4", "int8"])
@pytest.mark.parametrize("block", [32, 64, "channel"])
def test_real_formats_stay_above_the_gaussian_limit_on_gaussian_weights(name, block, clip):
    fmt = get_format(name, block=block, clip=clip)
    w_OI = gaussian(512, 512).float()
    error = ((fake_quantize(w_OI, fmt) - w_OI).norm() / w_OI.norm()).item()
    bits = stored_bits(tuple(w_OI.shape), fmt) / w_OI.numel()
    assert error > gaussian_limit(w_OI, bits)
    assert error > shannon_limit(w_OI, bits)


def test_weights_of_few_values_have_no_entropy_to_bound_with():
    assert shannon_limit(gaussian(256, 256).sign(), 1) == 0
    # bfloat16 coincides often, and far below what 4 bits resolve
    w_OI = gaussian(512, 512)
    assert shannon_limit(w_OI.bfloat16(), 4) == pytest.approx(shannon_limit(w_OI, 4), rel=0.01)


def test_limits_are_means_over_layers():
    weights = {"a": gaussian(64, 64), "b": gaussian(256, 8) @ gaussian(8, 64)}
    found = mean_limits(weights, 3.0)
    assert list(found) == ["gaussian", "spectral", "shannon"]
    for limit, value in zip(LIMITS, found.values(), strict=True):
        assert value == pytest.approx((limit(weights["a"], 3) + limit(weights["b"], 3)) / 2)


def test_invalid_arguments_raise():
    w_OI = gaussian(4, 4)
    broken = w_OI.clone()
    broken[0, 3] = math.nan
    for limit in LIMITS:
        with pytest.raises(LoraqError, match=r"bits=-1.*0 or more"):
            limit(w_OI, -1)
        with pytest.raises(LoraqError, match="not a matrix"):
            limit(w_OI[0], 4)
        with pytest.raises(LoraqError, match="1 of 16 weights are not finite"):
            limit(broken, 4)
        with pytest.raises(LoraqError, match="All 16 weights are 0"):
            limit(torch.zeros(4, 4), 4)
    with pytest.raises(LoraqError, match=r"16 weights.*at least 256"):
        shannon_limit(w_OI, 4)
    with pytest.raises(LoraqError, match="0 layers"):
        mean_limits({}, 4)
