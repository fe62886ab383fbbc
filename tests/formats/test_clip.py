"""The MSE clip search: never worse than no clipping, and better for blocks with outliers."""

from __future__ import annotations

import pytest
import torch

from loraq.formats import FORMATS, dequantize, fake_quantize, get_format, quantize
from loraq.formats.blocks import to_blocks

BLOCK_NAMES = [name for name, spec in FORMATS.items() if spec.family != "float"]


def block_errors(x: torch.Tensor, result: torch.Tensor, block: int) -> torch.Tensor:
    return to_blocks((result.double() - x.double()).square(), block).sum(-1)


@pytest.mark.parametrize("name", BLOCK_NAMES)
@pytest.mark.parametrize("block", [16, 64])
def test_never_worse_in_any_block(name, block):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, 200, generator=generator)
    x[:32] *= torch.rand(32, 200, generator=generator) ** 4
    x[50] = 0
    plain, searched = get_format(name, block=block), get_format(name, block=block, clip="mse")
    before = block_errors(x, fake_quantize(x, plain), block)
    after = block_errors(x, fake_quantize(x, searched), block)
    assert (after <= before).all()
    assert torch.equal(dequantize(quantize(x, searched)), fake_quantize(x, searched))
    if plain.bits == 4 and name != "uint4":
        assert after.sum() < 0.98 * before.sum()


def test_per_tensor_scale_is_searched_too():
    x = torch.randn(40, 50, generator=torch.Generator().manual_seed(4))
    plain, searched = get_format("int4", block=-1), get_format("int4", block=-1, clip="mse")
    errors = [(fake_quantize(x, fmt) - x).square().sum() for fmt in (plain, searched)]
    assert errors[1] < 0.9 * errors[0]
