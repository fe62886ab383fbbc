"""Launches and traffic of one emulated layer on a GPU: the definition's operations, and fused.

Traffic of activations, in reads and writes of x in 16 bits (a 16-bit layer: 1). The layer has
loraq_best's transform, 1152 channels and rank 64.

    recipe                           operations         fused
                                     launches traffic   launches traffic
    int4, W4A8 branch                58       49.6      4        3.1
    int4, fp16 branch                30       29.9      4        3.1
    mxfp4, mxfp8 branch              85       65.3      4        3.1
    mxint4                           79       51.0      4        3.1
    nvfp4                            83       66.1      4        3.1
    nvfp4 with tensor_scale=token    88       62.0      4        3.1
    int8                             42       28.9      4        2.6
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loraq.layers import LayerTensors, QuantizedLinear
from loraq.layers.backends import Emulated
from loraq.transforms import InputTransform
from tests.kernels.layers import RECIPES, random_layer
from tests.simulated import simulated_cuda

ROWS, WIDTH, OUT, RANK = 256, 1152, 1152, 64
RECIPE_NAMES = (
    "int4, W4A8 branch", "int4, fp16 branch", "mxfp4, mxfp8 branch", "mxint4", "nvfp4",
    "nvfp4 with tensor_scale=token", "int8",
)  # fmt: skip


class Counter(TorchDispatchMode):
    """Kernels, and the bytes of activations that they read and write; views are no kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.bytes, self.names = 0, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func.is_view or func in FREE:
            return made
        touched = [x for x in tree_leaves((args, kwargs, made)) if isinstance(x, Tensor)]
        touched = [x for x in touched if ROWS in x.shape]
        self.launches += 1
        self.bytes += sum(x.numel() * x.element_size() for x in touched)
        self.names.append(func.name())
        return made


FREE = {torch.ops.aten.empty.memory_format, torch.ops.aten.detach.default}


@dataclass
class Count:
    """traffic: bytes over those of one read and one write of x in 16 bits."""

    launches: int
    traffic: float
    names: list[str]


def counted(run: Callable[[], Tensor]) -> Count:
    run()  # operands are prepared at the first call
    with torch.no_grad(), Counter() as counter:
        run()
    return Count(counter.launches, counter.bytes / (4 * ROWS * WIDTH), counter.names)


def layer(recipe: str) -> LayerTensors:
    """A layer with loraq_best's transform: smoothing and rotation."""
    signs = torch.where(torch.arange(WIDTH) % 3 == 0, -1, 1).to(torch.int8)
    smooth = torch.linspace(0.5, 2, WIDTH).bfloat16().float()
    tensors = random_layer(RECIPES[recipe], OUT, WIDTH, RANK)
    return replace(tensors, transform=InputTransform(smooth, signs, 64))


def by_operations(tensors: LayerTensors, x: Tensor) -> Count:
    compute = Emulated(tensors, torch.bfloat16, x.device, operands=torch.bfloat16)
    transform = tensors.transform.to(x.device, torch.bfloat16)
    return counted(lambda: compute.multiply(compute.quantize(transform.input(x))))


def fused(tensors: LayerTensors, x: Tensor) -> Count:
    with simulated_cuda():
        module, there = QuantizedLinear(tensors).to("cuda"), x.cuda()
        return counted(lambda: module(there))


@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_a_layer_takes_four_launches(recipe):
    """x̃ and both quantisations, ·Rᵀ, its quantisation, and one product."""
    tensors, x = layer(recipe), torch.randn(ROWS, WIDTH).bfloat16()
    before, after = by_operations(tensors, x), fused(tensors, x)
    assert after.launches == 4, after.names
    assert after.traffic < 3.2  # of which 1 is that of the layer in 16 bits
    assert before.launches > 7 * after.launches and before.traffic > 9 * after.traffic
