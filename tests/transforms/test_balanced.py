"""Balanced smoothing is optimal; moments from a model's weights match its inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loraq.models.families.pixart_sigma import known_inputs
from loraq.models.moments import Moment, Moments, linear, modulated
from loraq.transforms.input_transform import InputTransform
from loraq.transforms.smoothing import DAMP, balanced_scale


def bound(s_I, rms_I, w_OI) -> float:
    """Σ x²/s² · Σ s²‖w‖²: the bound on a rotated block's rounding errors."""
    return ((rms_I / s_I).square().sum() * (s_I * w_OI.norm(dim=0)).square().sum()).item()


@given(seed=st.integers(0, 1000), factor=st.floats(0.25, 4))
def test_no_other_scale_has_a_lower_bound(seed, factor):
    g = torch.Generator().manual_seed(seed)
    rms_I, w_OI = torch.rand(16, generator=g) + 0.05, torch.randn(24, 16, generator=g)
    best = balanced_scale(rms_I, w_OI)
    rms_I = (
        rms_I.square() + DAMP * rms_I.square().mean()
    ).sqrt()  # the damped energies that it is optimal for
    least = bound(best, rms_I, w_OI)
    closed = (rms_I * w_OI.norm(dim=0)).sum().square().item()
    assert least == pytest.approx(closed, rel=1e-3)  # bfloat16 scales
    other = best.clone()
    other[seed % 16] *= factor
    assert bound(other, rms_I, w_OI) >= least * (1 - 1e-3)


def test_dead_channels_have_scale_one_and_the_mean_scale_is_one():
    rms_I, w_OI = torch.tensor([0.0, 2.0, 8.0]), torch.ones(4, 3)
    s = balanced_scale(rms_I, w_OI)
    assert s[0] == 1 and s[2] / s[1] == pytest.approx(2, rel=1e-2)


def test_a_channel_that_is_zero_in_calibration_has_a_bounded_scale():
    rms_I = torch.ones(64)
    rms_I[5] = 1e-12
    s = balanced_scale(rms_I, torch.ones(4, 64))
    assert s.max() / s.min() < DAMP**-0.25 * 1.02


def test_moments_are_those_of_samples():
    g = torch.Generator().manual_seed(0)
    shift, scale = torch.randn(5, 8, generator=g), 0.5 * torch.randn(5, 8, generator=g)
    layer = torch.nn.Linear(8, 6)
    n = torch.randn(40_000, 5, 8, generator=g)
    x = n * (1 + scale) + shift
    known = modulated(shift, scale)
    moment = known.pooled()
    assert_moment(moment, x)
    second_BII = InputTransform(shift=0.3).moment(moment.second_II[None], moment.mean_I[None])
    rms_I = second_BII[0].diagonal().sqrt()
    assert torch.allclose(rms_I, (x + 0.3).square().mean((0, 1)).sqrt(), rtol=0.02)
    with torch.no_grad():
        y = layer(x)
    rms_O = linear(known, torch.nn.Sequential(layer), "0").pooled().second_II.diagonal().sqrt()
    assert torch.allclose(rms_O, y.square().mean((0, 1)).sqrt(), rtol=0.02)
    assert isinstance(known, Moments) and known.mean_TI.shape == (5, 8)


def assert_moment(moment: Moment, x_STI: torch.Tensor) -> None:
    """E[xᵀx] and E[x] of samples at every timestep, within sampling error."""
    samples = x_STI.flatten(0, 1)
    scale = moment.second_II.diagonal().mean()
    second_II = samples.T @ samples / len(samples)
    assert (moment.second_II - second_II).abs().max() < 0.02 * scale
    assert (moment.mean_I - samples.mean(0)).abs().max() < 0.02 * scale.sqrt()


def test_moments_from_the_weights_correlate_with_the_inputs(embedded):
    """log rms of channels, from the weights and measured: correlated in every block."""
    known = known_inputs(embedded.transformer)
    least = {"qkv": 0.85, "up": 0.6, "out": 0.3}
    assert len(known) == 3 * 6
    for name, moment in known.items():
        rms_I = moment.second_II.diagonal().sqrt()
        seen_TI = embedded.inputs[name].float()
        pair = torch.stack([rms_I, seen_TI.square().mean(0).sqrt()]).log()
        assert torch.corrcoef(pair)[0, 1] > least[name.rsplit(".")[-1]], name
