"""Random packed layers and inputs for the kernel tests."""

from __future__ import annotations

import torch
from torch import Tensor

from loraq.formats import Format, get_format, quantize
from loraq.layers.tensors import LayerTensors

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# (main weight, main activation, branch weight, branch activation)
RECIPES = {
    "int4, int8 branch": ("int4", "int4", "int8", "int8"),
    "int4, W4A8 branch": ("int4", "int4", "int4", "int8"),
    "int4, W6A6 branch": ("int4", "int4", "int6", "int6"),
    "int4, W4A4 branch": ("int4", "int4", "int4", "int4"),
    "int4 behind GELU": ("int4", "uint4", "int8", "int8"),
    "int8": ("int8", "int8", "int8", "int8"),
    "int4, fp16 branch": ("int4", "int4", "fp16", "fp16"),
    "int4, bf16 branch": ("int4", "int4", "bf16", "bf16"),
    "mxfp4, mxfp8 branch": ("mxfp4_e2m1", "mxfp4_e2m1", "mxfp8_e4m3", "mxfp8_e4m3"),
    "mxfp4, e5m2 branch": ("mxfp4_e2m1", "mxfp4_e2m1", "mxfp8_e5m2", "mxfp8_e5m2"),
    "mxfp4, mxint8 branch": ("mxfp4_e2m1", "mxfp4_e2m1", "mxint8", "mxint8"),
    "mxfp4, mxfp6 branch": ("mxfp4_e2m1", "mxfp4_e2m1", "mxfp6_e3m2", "mxfp6_e2m3"),
    "mxint4": ("mxint4", "mxint4", "mxint6", "mxint8"),
    "nvfp4": ("nvfp4", "nvfp4", "mxfp8_e4m3", "mxfp8_e4m3"),
    "nvfp4 with tensor_scale=token": ("nvfp4", "nvfp4 token", "nvfp4", "mxint8"),
    "mxfp8 branch, bf16 input": ("mxfp4_e2m1", "mxfp4_e2m1", "mxfp8_e4m3", "bf16"),
    "bf16 input of an mx layer": ("mxfp4_e2m1", "bf16", "mxint8", "mxint8"),
}


def named(name: str) -> Format:
    """`get_format` for names such as `nvfp4 token`, which is nvfp4 with tensor_scale=token."""
    name, _, tensor_scale = name.partition(" ")
    return get_format(name, tensor_scale=tensor_scale or None)


def activation(name: str) -> Format:
    return named("nvfp4 fixed" if name == "nvfp4" else name)


def random_layer(
    names: tuple[str, str, str, str],
    outputs: int = 40,
    width: int = 200,
    rank: int = 10,
    bias: bool = True,
    requantize: bool = True,
) -> LayerTensors:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return 0.2 * torch.randn(*shape, generator=generator)

    weight, x, branch_weight, branch_x = names
    return LayerTensors(
        weight=quantize(random(outputs, width), named(weight)),
        activation=activation(x),
        left=quantize(random(outputs, rank), named(branch_weight)) if rank else None,
        right=quantize(random(rank, width), named(branch_weight)) if rank else None,
        branch_activation=activation(branch_x) if rank else None,
        requantize_intermediate=requantize,
        bias_O=random(outputs) if bias else None,
    )


def random_input(rows: int, width: int, positive: bool = False) -> Tensor:
    """Tokens of very different magnitudes, one of them zero, with one outlier channel."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, width, generator=generator)
    x *= torch.logspace(-3, 2, max(rows, 1))[:rows, None]
    x[:, width // 2] *= 30
    x[:1] = 0
    return x.abs() if positive else x
