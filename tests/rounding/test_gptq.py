"""GPTQ against a NumPy implementation, and properties for every format."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loraq.config import RoundingConfig
from loraq.errors import LoraqError
from loraq.formats import FORMATS, dequantize, get_format, quantize
from loraq.rounding import gptq
from loraq.rounding.gptq import round_weights
from tests.formats import reference

OPTIONS = [(name, {}) for name, spec in FORMATS.items() if spec.family not in ("uint", "float")] + [
    ("int4", {"block": "channel"}),
    ("int6", {"block": 40, "scale": "bf16"}),
    ("int8", {"block": "tensor"}),
    ("mxfp4_e2m1", {"exponent": "ceil", "block": 150}),
    ("nvfp4", {"tensor_scale": "token"}),
    ("nvfp4", {"tensor_scale": "fixed"}),
]
FORMATS_TESTED = [get_format(name, **options) for name, options in OPTIONS]
CLIPPED = [("int4", None), ("int8", "tensor"), ("mxfp4_e2m1", None), ("nvfp4", None)]
SEARCHED = [get_format(name, block=block, clip="mse") for name, block in CLIPPED]
EVERY_FORMAT = pytest.mark.parametrize("fmt", FORMATS_TESTED, ids=lambda f: f.label)
BOTH_ORDERS = pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act_order"])


def options(**changes) -> RoundingConfig:
    return RoundingConfig(kind="gptq", **changes)


def problem(units: int, rows: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and the second moments of correlated inputs of unequal size."""
    g = torch.Generator().manual_seed(seed)
    x_BTI = torch.randn(units, 60, width // 3, generator=g) @ torch.randn(
        units, width // 3, width, generator=g
    )
    x_BTI = x_BTI + 0.3 * torch.randn(x_BTI.shape, generator=g)
    x_BTI *= torch.exp(torch.randn(units, 1, width, generator=g))
    w_BOI = 0.1 * torch.randn(units, rows, width, generator=g)
    return w_BOI, x_BTI.mT @ x_BTI / 60


def scale_of(values, fmt, tensor_scale):
    """The scales of values (rows, block), from docs/formats.md."""
    absmax = np.abs(values.astype(np.float32)).max(1)
    if fmt.family == "nvfp":
        grid = reference.float_grid("e4m3")
        wanted = absmax / np.float32(6) / tensor_scale
        return grid[reference.nearest_on_grid(wanted, grid)].astype(np.float32) * tensor_scale
    if fmt.family == "int":
        scale = torch.from_numpy(absmax / np.float32(reference.INTEGERS[fmt.name][1]))
        return scale.to(torch.bfloat16 if fmt.scale == "bf16" else torch.float16).float().numpy()
    if fmt.family == "mxint":
        bits, largest, fraction = reference.INTEGERS[fmt.name]
        largest, mantissa = largest / fraction, bits - 2
    else:
        _, mantissa, largest = reference.FLOATS[fmt.name.split("_")[1]]
    return np.array(
        [
            2.0 ** reference.shared_exponent(float(a), largest, mantissa, fmt.exponent)
            for a in absmax
        ]
    )


def grid_of(fmt):
    """Every magnitude of an element, ascending; the index is the code."""
    if fmt.family in ("int", "mxint"):
        _, largest, fraction = reference.INTEGERS[fmt.name]
        return np.arange(largest + 1) / fraction
    return reference.float_grid("e2m1" if fmt.family == "nvfp" else fmt.name.split("_")[1])


def restated(w_OI, second_II, fmt, act_order, damp=0.01):
    """Optimal Brain Surgeon, column by column with the complete inverse.

    Returns the dequantised weight, each value's distance to a rounding boundary (element units)
    and the order of the columns.
    """
    w, h = w_OI.double().numpy(), second_II.double().numpy()
    width = w.shape[1]
    block = {None: width, -1: w.size}.get(fmt.block, fmt.block)
    ts = np.float32(1)
    if fmt.tensor_scale == "tensor":
        ts = reference.nvfp4_tensor_scale(w_OI.numpy())
    elif fmt.tensor_scale == "token":
        ts = np.array([reference.nvfp4_tensor_scale(row) for row in w_OI.numpy()])

    def scales_at(values, start):
        if fmt.block == -1:
            return np.repeat(scale_of(w.reshape(1, -1), fmt, ts), len(w))
        return scale_of(values[:, start : start + block], fmt, ts)

    order = np.argsort(-np.diag(h), kind="stable") if act_order else np.arange(width)
    static = {n: scales_at(w, n * block) for n in range(-(-width // block))} if act_order else {}
    inverse = np.linalg.inv((h + damp * np.diag(h).mean() * np.eye(width))[np.ix_(order, order)])
    now = w[:, order].copy()
    grid = grid_of(fmt)
    middles = (grid[1:] + grid[:-1]) / 2
    result, margin = np.zeros_like(now), np.zeros_like(now)
    for i in range(width):
        n = order[i] // block
        if n not in static:
            static[n] = scales_at(now, i)
        with np.errstate(divide="ignore", invalid="ignore"):
            scaled = np.where(static[n] == 0, 0.0, now[:, i] / static[n])
        result[:, i] = np.sign(scaled) * grid[reference.nearest_on_grid(scaled, grid)] * static[n]
        margin[:, i] = np.abs(np.abs(scaled)[:, None] - middles).min(1)
        error = (now[:, i] - result[:, i]) / inverse[i, i]
        now[:, i + 1 :] -= np.outer(error, inverse[i, i + 1 :])
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    back = np.argsort(order)
    return result[:, back], margin[:, back], order


def weighted_error(w_OI, stored, second_II) -> float:
    error_OI = w_OI.double() - dequantize(stored).double()
    return float(((error_OI @ second_II.double()) * error_OI).sum())


def same_bits(a, b) -> bool:
    names = a.tensors().keys()
    return names == b.tensors().keys() and all(
        torch.equal(a.tensors()[name], b.tensors()[name]) for name in names
    )


@EVERY_FORMAT
@BOTH_ORDERS
def test_agrees_with_the_complete_inverse_column_by_column(fmt, act_order):
    """A code may differ if its value is within 1e-5 of a boundary, and later codes of its row."""
    for seed in range(3):
        w_BOI, second_BII = problem(2, 6, 100, seed)
        stored = round_weights(w_BOI, fmt, second_BII, options(act_order=act_order, block=40))
        for b in range(2):
            wanted_OI, margin_OI, order_I = restated(w_BOI[b], second_BII[b], fmt, act_order)
            differs_OI = dequantize(stored[b]).double().numpy() != wanted_OI.astype(np.float32)
            assert differs_OI.mean() <= 0.01
            for o in np.flatnonzero(differs_OI.any(1)):
                first = order_I[np.flatnonzero(differs_OI[o, order_I])[0]]
                assert margin_OI[o, first] < 1e-5


@EVERY_FORMAT
@BOTH_ORDERS
def test_the_block_of_the_feedback_has_no_effect(fmt, act_order):
    w_BOI, second_BII = problem(2, 8, 100, seed=5)
    results = [
        round_weights(w_BOI, fmt, second_BII, options(act_order=act_order, block=block))
        for block in (1000, 128, 33, 1)
    ]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert (dequantize(a) != dequantize(b)).float().mean() <= 0.01


@pytest.mark.parametrize("fmt", FORMATS_TESTED + SEARCHED, ids=lambda f: f.label)
@BOTH_ORDERS
def test_uncorrelated_inputs_give_nearest_rounding(fmt, act_order):
    w_BOI, _ = problem(2, 8, 150)
    w_BOI[0, 2, 64:128] = 0
    power_BI = torch.rand(2, 150, generator=torch.Generator().manual_seed(1)) + 0.01
    for second_BII in (torch.eye(150).expand(2, -1, -1), torch.diag_embed(power_BI)):
        stored = round_weights(w_BOI, fmt, second_BII, options(act_order=act_order))
        for w_OI, one in zip(w_BOI, stored, strict=True):
            assert same_bits(one, quantize(w_OI, fmt))
            assert (one.shape, one.format) == ((8, 150), fmt)


@pytest.mark.parametrize("fmt", FORMATS_TESTED + SEARCHED, ids=lambda f: f.label)
@BOTH_ORDERS
def test_the_weighted_error_is_below_that_of_nearest_rounding(fmt, act_order):
    for seed in range(3):
        w_BOI, second_BII = problem(2, 8, 100, seed)
        stored = round_weights(w_BOI, fmt, second_BII, options(act_order=act_order))
        for w_OI, one, second_II in zip(w_BOI, stored, second_BII, strict=True):
            nearest = weighted_error(w_OI, quantize(w_OI, fmt), second_II)
            assert weighted_error(w_OI, one, second_II) < 0.9 * nearest


@EVERY_FORMAT
@BOTH_ORDERS
def test_units_are_independent(fmt, act_order, monkeypatch):
    w_BOI, second_BII = problem(3, 7, 101, seed=2)
    w_BOI[1] *= 100
    setting = options(act_order=act_order, block=50)
    together = round_weights(w_BOI, fmt, second_BII, setting)
    for b, one in enumerate(together):
        alone = round_weights(w_BOI[b : b + 1], fmt, second_BII[b : b + 1], setting)
        assert same_bits(one, alone[0])
    monkeypatch.setattr(gptq, "MAX_ELEMENTS", 2 * 101 * 108)  # in two parts
    for one, other in zip(together, round_weights(w_BOI, fmt, second_BII, setting), strict=True):
        assert same_bits(one, other)


@BOTH_ORDERS
@pytest.mark.parametrize("fmt", FORMATS_TESTED + SEARCHED, ids=lambda f: f.label)
def test_dead_inputs_are_rounded_to_nearest_and_have_no_effect(fmt, act_order):
    w_BOI, second_BII = problem(2, 6, 150)
    dead = torch.arange(150) % 7 == 3
    second_BII[0, dead], second_BII[0, :, dead] = 0, 0
    second_BII[1] = 0
    stored = round_weights(w_BOI, fmt, second_BII, options(act_order=act_order))
    result_OI = dequantize(stored[0])
    assert result_OI.isfinite().all()
    assert same_bits(stored[1], quantize(w_BOI[1], fmt))
    moved = w_BOI[:1].clone()
    moved[..., dead] *= -1  # scales stay, and nothing is fed back from them
    other_OI = dequantize(
        round_weights(moved, fmt, second_BII[:1], options(act_order=act_order))[0]
    )
    assert torch.equal(other_OI[:, ~dead], result_OI[:, ~dead])
    assert torch.equal(other_OI[:, dead], -result_OI[:, dead])
    if act_order or fmt.block in (None, -1):
        assert torch.equal(result_OI[:, dead], dequantize(quantize(w_BOI[0], fmt))[:, dead])


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_sixteen_bit_floats_are_a_cast(name):
    w_BOI, second_BII = problem(2, 5, 30)
    stored = round_weights(w_BOI, get_format(name), second_BII, options())
    for w_OI, one in zip(w_BOI, stored, strict=True):
        assert same_bits(one, quantize(w_OI, get_format(name)))


def test_invalid_inputs_raise_with_a_remedy():
    w_BOI, second_BII = problem(2, 5, 30)
    fmt = get_format("int4")

    def refused(match, w=w_BOI, second=second_BII, fmt=fmt, **changes):
        with pytest.raises(LoraqError, match=match):
            round_weights(w, fmt, second, options(**changes))

    refused("need .2, 30, 30.", second=second_BII[:, :20, :20])
    refused("need .2, 30, 30.", second=second_BII[:1])
    refused("leading axis", w=w_BOI[0])
    for bad in (float("nan"), float("inf")):
        spoilt = second_BII.clone()
        spoilt[1, 3, 4] = bad
        refused("1 values that are NaN or Inf.*Capture", second=spoilt)
        broken = w_BOI.clone()
        broken[1, 3, 4] = bad
        refused("Fix the computation", w=broken)
    refused("30 negative", second=torch.cat([second_BII[:1], -second_BII[1:]]))
    ones = torch.ones(2, 30, 30)
    ones[:, 0, 1] = ones[:, 1, 0] = 5.0
    refused("Raise quant.rounding.damp", second=ones)
    refused("scale='bf16'", w=w_BOI * 1e8)
    refused("scale='bf16'", w=w_BOI * 1e8, act_order=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@EVERY_FORMAT
@BOTH_ORDERS
def test_a_gpu_gives_the_same_codes(fmt, act_order):
    w_BOI, second_BII = problem(2, 8, 150)
    here = round_weights(w_BOI, fmt, second_BII, options(act_order=act_order))
    there = round_weights(w_BOI.cuda(), fmt, second_BII, options(act_order=act_order))
    for a, b in zip(here, there, strict=True):
        assert (dequantize(a) != dequantize(b).cpu()).float().mean() <= 0.01
