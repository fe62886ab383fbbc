"""`quantize_with_scales`: equal to `quantize` for the same scales, and saturating."""

from __future__ import annotations

import pytest
import torch

from loraq.errors import LoraqError
from loraq.formats import dequantize, get_format, quantize
from loraq.formats.quantization import quantize_with_scales
from tests.formats.test_edges import ALL_FORMATS, randn

BLOCK_FORMATS = [fmt for fmt in ALL_FORMATS if fmt.family != "float"]


@pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=lambda f: f.label)
@pytest.mark.parametrize("shape", [(74,), (3, 150), (2, 5, 64)])
def test_the_scales_of_quantize_give_the_same_bits(fmt, shape):
    x = randn(*shape)
    x[..., 3:9] = -0.0
    stored = quantize(x, fmt)
    again = quantize_with_scales(x, fmt, stored.scale, stored.tensor_scale)
    assert (again.shape, again.format) == (stored.shape, fmt)
    for name, tensor in stored.tensors().items():
        assert torch.equal(tensor, again.tensors()[name])


@pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=lambda f: f.label)
def test_values_beyond_the_scale_saturate(fmt):
    x = randn(3, 70).abs()
    stored = quantize(x, fmt)
    again = quantize_with_scales(1e4 * x, fmt, stored.scale, stored.tensor_scale)
    assert torch.equal(again.scale, stored.scale)
    largest = dequantize(again).amax(-1) / fmt.element.maximum
    assert torch.equal(dequantize(again).amax(-1), largest * fmt.element.maximum)
    assert (dequantize(again) >= dequantize(stored)).all()


def test_scales_that_do_not_fit_raise():
    fmt, x = get_format("int4"), randn(3, 150)
    good = quantize(x, fmt).scale
    for bad in (good[:, :2], good.float(), good[0]):
        with pytest.raises(LoraqError, match=r"shape \(3, 3\) and dtype torch.float16"):
            quantize_with_scales(x, fmt, bad)
    with pytest.raises(LoraqError, match="no scales"):
        quantize_with_scales(x, get_format("bf16"), good)
    with pytest.raises(LoraqError, match="tensor_scale=none"):
        quantize_with_scales(x, fmt, good, torch.ones(()))
    nvfp4 = get_format("nvfp4")
    with pytest.raises(LoraqError, match="tensor_scale=tensor"):
        quantize_with_scales(x, nvfp4, quantize(x, nvfp4).scale)
    x[0, 0] = float("nan")
    with pytest.raises(LoraqError, match="NaN"):
        quantize_with_scales(x, fmt, good)
