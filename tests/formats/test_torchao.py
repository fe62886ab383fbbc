"""Bit-for-bit agreement with torchao's MX tensors: codes, scale bytes and values."""

from __future__ import annotations

import warnings

import pytest
import torch

from loraq.formats import dequantize, fake_quantize, get_format, quantize
from loraq.formats.packing import unpack

pytest.importorskip("torchao")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_dtype, to_mx
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

ELEMENT_TYPES = {
    "mxfp8_e4m3": torch.float8_e4m3fn,
    "mxfp8_e5m2": torch.float8_e5m2,
    "mxfp6_e2m3": "fp6_e2m3",
    "mxfp6_e3m2": "fp6_e3m2",
    "mxfp4_e2m1": torch.float4_e2m1fn_x2,
}


def samples() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(400, 256, generator=generator)
    x *= torch.exp2(torch.randint(-90, 90, (400, 1), generator=generator).float())
    x[:100] = x[:100].bfloat16().float()
    x[100:120] = torch.randint(-64, 65, (20, 256), generator=generator) / 8  # ties
    x[120:140] *= torch.exp2(torch.randint(-30, 1, (20, 256), generator=generator).float())
    x[140, 32:64] = 0
    x[141] = -0.0
    x[142:150] = torch.exp2(torch.randint(-6, 3, (8, 256), generator=generator).float())
    return x


@pytest.mark.parametrize("rule", ["floor", "ceil", "even", "rceil"])
@pytest.mark.parametrize("name", ELEMENT_TYPES)
def test_mx_tensors(name, rule):
    x = samples()
    fmt = get_format(name, exponent=rule)
    ours = quantize(x, fmt)
    mode = ScaleCalculationMode[rule.upper()]
    scale, data = to_mx(x, ELEMENT_TYPES[name], 32, mode)
    assert torch.equal(ours.scale, scale.view(torch.uint8))
    theirs = data.view(torch.uint8)
    codes = ours.codes if fmt.bits != 6 else unpack(ours.codes, 6, x.shape[-1])
    assert torch.equal(codes, theirs)
    values = to_dtype(data, scale, ELEMENT_TYPES[name], 32, torch.float32)
    assert torch.equal(dequantize(ours), values)
    assert torch.equal(fake_quantize(x, fmt), values)


def test_nvfp4_scales_equal_and_codes_equal_but_for_ties():
    """torchao multiplies by a reciprocal where we divide, and lifts tiny block scales."""
    x = torch.randn(400, 256, generator=torch.Generator().manual_seed(2))
    tensor_scale = per_tensor_amax_to_scale(x.abs().amax())
    scale, data = nvfp4_quantize(x, 16, tensor_scale)
    ours = quantize(x, get_format("nvfp4"))
    assert torch.equal(ours.tensor_scale, tensor_scale)
    assert torch.equal(ours.scale, scale.view(torch.uint8))
    assert (ours.codes != data).float().mean() < 1e-4
