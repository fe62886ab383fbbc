"""torch.compile changes no format: Inductor folds roundings to 16 bits, and must not see them."""

from __future__ import annotations

import pytest
import torch

from loraq.formats import fake_quantize, get_format
from loraq.layers import QuantizedLinear
from loraq.layers.stacked import quantize_stacked
from loraq.transforms import InputTransform, hadamard
from tests.kernels.layers import random_layer

CASES = {
    "int4 with fp16 scales": ("int4", {}, torch.bfloat16),
    "int8 with bf16 scales": ("int8", {"scale": "bf16"}, torch.float16),
    "uint4": ("uint4", {"block": "channel"}, torch.float32),
    "a scale per tensor": ("int4", {"block": "tensor"}, torch.float32),
    "fp16": ("fp16", {}, torch.float32),
    "bf16": ("bf16", {}, torch.float16),
    "mxfp4": ("mxfp4_e2m1", {"exponent": "even"}, torch.bfloat16),
    "nvfp4": ("nvfp4", {"tensor_scale": "token"}, torch.bfloat16),
}


ALL = [*CASES, "a layer", "the operands of a layer on a GPU"]


@pytest.fixture(scope="module")
def results():
    """Every case by itself and compiled with the others in one graph, after an operation on x."""
    formats = [(get_format(name, **options), dtype) for name, options, dtype in CASES.values()]
    layer = QuantizedLinear(random_layer(("int4", "int4", "int8", "int8")))
    on_a_gpu = dict(
        transform=InputTransform(signs_I=torch.ones(200, dtype=torch.int8), block=8, shift=0.25),
        dtype=torch.bfloat16,
        activation=get_format("int4"),
        right_RI=torch.randn(16, 200).bfloat16(),
        branch_activation=get_format("int8"),
    )

    def computed(x):
        made = [fake_quantize((x * 1.1).to(dtype), fmt) for fmt, dtype in formats]
        stacked = quantize_stacked(x.to(torch.bfloat16), **on_a_gpu).main
        return [*made, layer(x.to(torch.bfloat16)), stacked]

    x = torch.randn(6, 200, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hadamard._cached_matrix.cache_clear()
        compiled = torch.compile(computed, fullgraph=True, backend="inductor")(x)
        kept = hadamard._cached_matrix.cache_info().currsize
        assert not kept, "a graph of CUDA would reuse memory that an operator keeps"
        plain = computed(x)
    return dict(zip(ALL, zip(plain, compiled, strict=True), strict=True))


@pytest.mark.parametrize("case", ALL)
def test_the_bits_are_the_same(results, case):
    plain, compiled = results[case]
    assert plain.dtype == compiled.dtype and torch.equal(plain, compiled)
