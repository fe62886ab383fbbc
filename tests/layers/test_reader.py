"""docs/checkpoints.md and docs/formats.md as a NumPy program, against the packed layers.

The reader below shares no code with the library: it knows the pages' formulas only.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from loraq.formats import get_format, quantize
from loraq.layers import LayerTensors, QuantizedLinear
from loraq.layers.serialization import serialize_layers
from loraq.transforms import InputTransform
from tests.formats import reference
from tests.kernels.layers import activation, named

WIDTH, OUT, RANK, BLOCK = 48, 12, 5, 16
RECIPES = [
    ("int4", "int4", "int8", "int8"),
    ("mxfp4_e2m1", "mxfp6_e3m2", "mxfp6_e2m3", "mxint8"),
    ("nvfp4", "nvfp4", "int6", "mxfp8_e4m3"),
    ("mxint4", "mxint6", "fp16", "mxfp8_e5m2"),
]


def codes_of(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Codes of rows of bytes: little-endian bit fields."""
    ordered = np.unpackbits(data, axis=-1, bitorder="little")[:, : count * bits]
    return (ordered.reshape(len(data), count, bits) << np.arange(bits)).sum(-1)


def values_of(codes: np.ndarray, name: str) -> np.ndarray:
    if name in reference.INTEGERS:
        bits, _, divisor = reference.INTEGERS[name]
        signed = codes - (codes >> (bits - 1) << bits) if name != "uint4" else codes
        return signed / divisor
    element = "e2m1" if name == "nvfp4" else name.split("_")[1]
    bits = 1 + sum(reference.FLOATS[element][:2])
    grid = reference.float_grid(element)
    return grid[codes & (2 ** (bits - 1) - 1)] * np.where(codes >> (bits - 1), -1, 1)


def scales_of(stored: np.ndarray, scale: str) -> np.ndarray:
    if scale == "e8m0":
        return 2.0 ** (stored.astype(int) - 127)
    return reference.float_grid("e4m3")[stored] if scale == "e4m3" else stored.astype(np.float64)


def bfloat16(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.view(torch.int16).numpy().astype(np.uint32) << 16).view(np.float32)


def matrix(entry, tensors) -> np.ndarray:
    """The dequantised matrix of an operand's entry."""
    fmt, count, prefix = entry["format"], entry["shape"][1], entry["tensors"]
    codes = tensors[f"{prefix}.codes"].numpy()
    if fmt["family"] == "float":
        return codes.astype(np.float64)
    block = fmt["block"] or count
    scale = scales_of(tensors[f"{prefix}.scale"].numpy(), fmt["scale"])
    values = values_of(codes_of(codes, fmt["bits"], count), fmt["name"])
    values = values * np.repeat(scale, block, axis=1)[:, :count]
    return values * tensors.get(f"{prefix}.tensor_scale", torch.ones(())).numpy()


def rounded(x: np.ndarray, fmt) -> np.ndarray:
    """Qa: every token (row) on its own."""
    block = fmt["block"] or x.shape[1]
    if fmt["name"] == "nvfp4":
        return np.stack([reference.nvfp4_row(row, np.float32(1), block) for row in x])
    return np.stack([reference.fake_row(row, fmt["name"], block) for row in x])


def sylvester(size: int) -> np.ndarray:
    if size == 1:
        return np.ones((1, 1))
    h = sylvester(size // 2)
    return np.block([[h, h], [h, -h]]) / np.sqrt(2)


class Reader:
    """One layer from its entry and its tensors."""

    def __init__(self, name: str, entry, tensors) -> None:
        self.entry = entry
        self.weight, self.left, self.right = (
            matrix(entry[part], tensors) for part in ("weight", "left", "right")
        )
        transform = entry["transform"]
        self.shift, prefix = transform["shift"], transform["tensors"]
        self.smooth, self.signs, self.h = np.ones(WIDTH), np.ones(WIDTH), np.eye(WIDTH)
        if transform["smooth"]:
            self.smooth = bfloat16(tensors[f"{prefix}.smooth"])
        if block := transform["block"]:
            data = tensors[f"{prefix}.signs"].numpy()
            bits = [data[i // 8] >> i % 8 & 1 for i in range(WIDTH)]
            self.signs = np.where(np.array(bits) == 1, 1, -1)
            self.h = np.kron(np.eye(WIDTH // block), sylvester(block))
        self.bias = tensors[f"{name}.bias"].numpy() if entry["bias"] else np.zeros(OUT)

    def forward(self, x: np.ndarray) -> np.ndarray:
        x = ((((x + self.shift) / self.smooth) * self.signs) @ self.h).astype(np.float32)
        h = rounded(x, self.entry["branch_activation"]) @ self.right.T
        if self.entry["requantize_intermediate"]:
            h = rounded(h.astype(np.float32), self.entry["branch_activation"])
        return rounded(x, self.entry["activation"]) @ self.weight.T + h @ self.left.T + self.bias

    def plain(self) -> tuple[np.ndarray, np.ndarray]:
        """Ŵ and bias of an ordinary layer."""
        weight = (((self.weight + self.left @ self.right) @ self.h) * self.signs) / self.smooth
        return weight, self.bias + self.shift * weight.sum(1)


def packed(recipe, requantize: bool) -> LayerTensors:
    """Powers of two in the transform, so that x̃ is exact here and there."""
    g = torch.Generator().manual_seed(0)
    weight, x, branch_weight, branch_x = recipe
    transform = InputTransform(
        smooth_I=torch.exp2(torch.randint(-2, 3, (WIDTH,), generator=g).float()),
        signs_I=(torch.randint(0, 2, (WIDTH,), generator=g) * 2 - 1).to(torch.int8),
        block=BLOCK,
        shift=0.25,
    )
    return LayerTensors(
        weight=quantize(torch.randn(OUT, WIDTH, generator=g), get_format(weight)),
        left=quantize(torch.randn(OUT, RANK, generator=g), get_format(branch_weight)),
        right=quantize(torch.randn(RANK, WIDTH, generator=g), get_format(branch_weight)),
        activation=activation(x),
        branch_activation=named(branch_x),
        requantize_intermediate=requantize,
        transform=transform,
        bias_O=torch.randn(OUT, generator=g),
    )


def near(found: np.ndarray, wanted: torch.Tensor) -> bool:
    return float(np.linalg.norm(found - wanted.numpy())) < 2e-6 * float(wanted.norm())


@pytest.mark.parametrize("requantize", [True, False])
@pytest.mark.parametrize("recipe", RECIPES, ids="-".join)
def test_the_pages_describe_what_is_stored(recipe, requantize):
    layer = packed(recipe, requantize)
    entries, tensors = serialize_layers({"net": layer})
    reader = Reader("net", entries["net"], tensors)
    x = torch.randint(-64, 65, (2, WIDTH, 3, 2), generator=torch.Generator().manual_seed(3)) / 16
    tokens = x.movedim(1, -1).reshape(-1, WIDTH)
    rows = tokens.numpy()
    wanted = reader.forward(rows)
    assert near(wanted, QuantizedLinear(layer)(tokens))
    pixels = QuantizedLinear(layer, convolution=True)(x)
    assert near(wanted, pixels.movedim(1, -1).reshape(-1, OUT))
    weight, bias = reader.plain()
    assert near(weight, layer.effective_weight())
    made = layer.dequantized_module(convolution=True, dtype=torch.float32)
    assert near(weight, made.weight.detach()[:, :, 0, 0]) and near(bias, made.bias.detach())
    steps = [np.linalg.norm(wanted), np.linalg.norm(rows @ weight.T + bias - wanted)]
    assert all(small < 0.35 * large for large, small in pairwise(steps))  # rounding of x alone
