"""Zeros, NaN, Inf, scales that underflow or overflow, and supported kinds of input."""

from __future__ import annotations

import pytest
import torch

from loraq.errors import LoraqError
from loraq.formats import FORMATS, blocks, dequantize, fake_quantize, get_format, quantize
from loraq.formats.quantization import QuantizedTensor

BLOCK_NAMES = [name for name, spec in FORMATS.items() if spec.family != "float"]
RULES = ("ceil", "even", "rceil")
OPTIONS = [(name, {}) for name in FORMATS] + [
    ("int4", {"block": "channel"}),
    ("int8", {"block": "tensor"}),
    ("int8", {"block": "tensor", "clip": "mse"}),
    ("int4", {"scale": "bf16", "clip": "mse"}),
    ("mxfp4_e2m1", {"exponent": "rceil", "clip": "mse"}),
    ("nvfp4", {"tensor_scale": "token"}),
    ("nvfp4", {"tensor_scale": "fixed", "clip": "mse"}),
    ("nvfp4", {"tensor_scale": "fixed_floor"}),
    ("int8", {"scale": "bf16"}),
    *((name, {"exponent": rule}) for name in FORMATS if name.startswith("mx") for rule in RULES),
]
ALL_FORMATS = [get_format(name, **options) for name, options in OPTIONS]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=lambda f: f.label)
def test_zeros_give_zeros(fmt):
    x = torch.zeros(3, 100)
    assert same_bits(fake_quantize(x, fmt), x)
    stored = quantize(x, fmt)
    assert same_bits(dequantize(stored), x) and not stored.codes.any()
    assert all(tensor.isfinite().all() for tensor in stored.tensors().values())
    x[1, 7] = 1.0  # next to blocks of zeros
    assert fake_quantize(x, fmt).count_nonzero() == 1


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=lambda f: f.label)
@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-30, 2e-9, 1e-7, 3e-7, 1e-5])
def test_tiny_blocks_stay_finite_and_no_larger(fmt, size):
    x = (randn(4, 100) * size).float()
    result = fake_quantize(x, fmt)
    assert result.isfinite().all()
    assert same_bits(result, dequantize(quantize(x, fmt)))
    assert result.abs().max() <= 2 * x.abs().max()


@pytest.mark.parametrize("name", BLOCK_NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_raise_in_quantize_and_make_their_block_nan_in_fake_quantize(name, bad):
    fmt = get_format(name, tensor_scale="fixed" if name == "nvfp4" else None)
    x = randn(2, 70).abs()
    clean = fake_quantize(x, fmt)
    x[1, 3] = bad
    with pytest.raises(LoraqError, match="not finite"):
        quantize(x, fmt)
    result = fake_quantize(x, fmt)
    assert result[1, : fmt.block].isnan().all()
    result[1, : fmt.block] = clean[1, : fmt.block]
    assert same_bits(result, clean)
    x[0, 69] = bad  # in the short last block
    tail = 70 // fmt.block * fmt.block
    result = fake_quantize(x, fmt)
    assert result[0, tail:].isnan().all() and result[0, :tail].isfinite().all()


@pytest.mark.parametrize("fmt", [f for f in ALL_FORMATS if not f.per_token], ids=lambda f: f.label)
def test_one_nan_with_a_scale_per_tensor_makes_all_nan(fmt):
    x = randn(3, 70)
    x[1, 1] = float("nan")
    assert fake_quantize(x, fmt).isnan().all()
    with pytest.raises(LoraqError, match="not finite"):
        quantize(x, fmt)


def test_sixteen_bit_floats_are_a_cast():
    x = torch.tensor([1.0, float("nan"), 1e6, -0.0])
    assert fake_quantize(x, get_format("fp16"))[2] == float("inf")
    assert fake_quantize(x, get_format("bf16"))[2] == x.bfloat16()[2]
    with pytest.raises(LoraqError, match="not finite"):
        quantize(x[2:], get_format("fp16"))
    with pytest.raises(LoraqError, match="not finite"):
        quantize(x[:2], get_format("bf16"))


def test_a_scale_above_fp16_raises_and_bf16_represents_it():
    x = torch.full((1, 64), 1e6)
    with pytest.raises(LoraqError, match="scale='bf16'"):
        quantize(x, get_format("int4"))
    assert fake_quantize(x, get_format("int4")).isnan().all()
    wide = dequantize(quantize(x, get_format("int4", scale="bf16")))
    assert torch.allclose(wide, x, rtol=2**-8)


def test_nvfp4_with_a_fixed_scale_saturates():
    result = fake_quantize(torch.full((1, 16), 1e6), get_format("nvfp4", tensor_scale="fixed"))
    assert result.unique().tolist() == [448.0 * 6]


@pytest.mark.parametrize(
    "fmt", [f for f in ALL_FORMATS if f.scale in ("e8m0", "e4m3", "bf16")], ids=lambda f: f.label
)
def test_the_limits_of_fp32_stay_finite(fmt):
    largest = torch.finfo(torch.float32).max
    for size in (2.0**-126, 2.0**-120, 2.0**120, 2.0**127, 0.99 * largest, largest):
        x = (randn(3, 64).clamp(-1, 1) * size).float()
        x[1, 5], x[2] = -size, size
        result = fake_quantize(x, fmt)
        assert result.isfinite().all()
        assert same_bits(result, dequantize(quantize(x, fmt)))


def test_stored_nan_scales_read_as_nan_blocks():
    for name, byte in (("mxfp4_e2m1", 255), ("mxint8", 255), ("nvfp4", 0x7F)):
        fmt = get_format(name)
        tensors = quantize(randn(1, 64), fmt).tensors()
        tensors["scale"][0, 0] = byte
        values = dequantize(QuantizedTensor.from_tensors(tensors, (1, 64), fmt))
        assert values[0, : fmt.block].isnan().all() and values[0, fmt.block :].isfinite().all()


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=lambda f: f.label)
def test_kinds_of_input(fmt, monkeypatch):
    x = randn(2, 5, 74)
    wanted = fake_quantize(x, fmt)
    strided = torch.empty(2, 74, 5).copy_(x.transpose(1, 2)).transpose(1, 2)
    assert not strided.is_contiguous() and same_bits(fake_quantize(strided, fmt), wanted)
    assert torch.equal(quantize(strided, fmt).codes, quantize(x, fmt).codes)
    turned = x[0].T.contiguous().T
    for name, tensor in quantize(turned, fmt).tensors().items():
        assert torch.equal(tensor, quantize(x[0], fmt).tensors()[name])
    wide = torch.cat([x, x], -1)[..., :74]
    assert same_bits(fake_quantize(wide, fmt), wanted)
    learnt = x.clone().requires_grad_()
    assert same_bits(fake_quantize(learnt, fmt), wanted)
    assert not fake_quantize(learnt, fmt).requires_grad
    with torch.inference_mode():
        assert same_bits(fake_quantize(x, fmt), wanted)
    assert same_bits(fake_quantize(x.double(), fmt), wanted)
    for dtype in (torch.float16, torch.bfloat16):
        short = x.to(dtype)
        assert same_bits(fake_quantize(short, fmt), fake_quantize(short.float(), fmt))
        assert same_bits(fake_quantize(short, fmt), dequantize(quantize(short, fmt)))
    stored = quantize(x, fmt)
    monkeypatch.setattr(blocks, "CHUNK_VALUES", 4 * 74)  # three chunks, the last one short
    assert same_bits(fake_quantize(x, fmt), wanted)
    for dtype in (torch.float16, torch.bfloat16):
        found = fake_quantize(x.to(dtype), fmt, dtype)
        assert found.dtype == dtype
        assert torch.equal(found, fake_quantize(x.to(dtype), fmt).to(dtype))
    for name, tensor in quantize(x, fmt).tensors().items():
        assert torch.equal(tensor, stored.tensors()[name])
    assert same_bits(x, randn(2, 5, 74))  # the input is unchanged


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=lambda f: f.label)
def test_no_rows(fmt):
    if fmt.per_token:
        x = torch.zeros(0, 64)
        assert dequantize(quantize(x, fmt)).shape == fake_quantize(x, fmt).shape == (0, 64)


@pytest.mark.parametrize("x", [torch.zeros(()), torch.zeros(3, 0), torch.zeros(3, dtype=torch.int)])
def test_input_that_cannot_be_quantised(x):
    for function in (quantize, fake_quantize):
        with pytest.raises(LoraqError, match="Cannot quantise"):
            function(x, get_format("int4"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=lambda f: f.label)
def test_a_gpu_gives_the_same_bits(fmt):
    x = randn(33, 5, 150)
    here, there = quantize(x, fmt), quantize(x.cuda(), fmt)
    for name, tensor in here.tensors().items():
        assert torch.equal(tensor, there.tensors()[name].cpu())
    assert same_bits(dequantize(there).cpu(), dequantize(here))
    assert same_bits(fake_quantize(x.cuda(), fmt).cpu(), fake_quantize(x, fmt))
