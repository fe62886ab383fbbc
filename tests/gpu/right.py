"""What must hold: kernels and quantisers are the definition, and a second run has the same bits."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

import torch

from loraq import recipe
from loraq.data import Prompt
from loraq.formats import fake_quantize
from loraq.formats.table import FORMATS
from loraq.layers.backends import make_compute
from loraq.layers.equation import quantized_linear
from loraq.layers.linear import set_compute
from loraq.quantization.quantizer import quantize_model
from loraq.runner.generate import image_batch
from tests.gpu.setting import Item, Row, Setting
from tests.kernels.layers import RECIPES, activation, random_input, random_layer

BOUND, FLOAT_BOUND = 1e-3, 1e-2
"""Of the relative distance of a layer's output: sums in another order change single codes of the
branch's intermediate; a bf16 one is rounded differently."""
SHAPES = {"odd": (37, 200, 40, 10), "PixArt-Σ's": (512, 1152, 1152, 40)}
"""Name → rows, width, outputs, rank."""


def items(setting: Setting) -> Iterator[Item]:
    """Kernels of every recipe, quantisers of every format, and equal bits on a second run."""
    for shape in ("odd",) if setting.dry else SHAPES:
        for name in RECIPES:
            call = functools.partial(kernel, setting, name, shape)
            yield Item(f"kernel: {name}, {shape} shape", call)
    for name in FORMATS:
        yield Item(f"quantiser: {name}", functools.partial(quantizer, setting, name))
    for name in RECIPES if not setting.dry else ("int4, int8 branch",):
        yield Item(f"again: kernel, {name}", functools.partial(kernel_again, setting, name))
    for model in setting.models:
        yield Item(f"again: quantising {model}", functools.partial(packed_again, setting, model))
        yield Item(f"again: latents of {model}", functools.partial(latents_again, setting, model))


def kernel(setting: Setting, name: str, shape: str) -> Row:
    """A layer by kernels on the device, and by the definition in float32 on the CPU."""
    rows, width, outputs, rank = SHAPES[shape]
    tensors = random_layer(RECIPES[name], outputs, width, rank)
    x = random_input(rows, width, positive="GELU" in name)
    wanted = quantized_linear(x, bias_O=tensors.bias_O, **tensors.equation_arguments())
    layer = make_compute("triton", tensors.to(setting.device), x.dtype, setting.device)
    found = layer.multiply(layer.quantize(x.to(setting.device))).cpu()
    distance = float((found.double() - wanted.double()).norm() / wanted.double().norm())
    bound = FLOAT_BOUND if "bf16" in RECIPES[name][3] else BOUND
    return {"distance": distance, "bound": bound, "holds": distance < bound}


def quantizer(setting: Setting, name: str) -> Row:
    """Fake quantisation on the device has the CPU's bits, for float32 and 16-bit values."""
    fmt, same = activation(name), []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = random_input(64, 200, positive=name == "uint4").to(dtype)
        found = fake_quantize(x.to(setting.device), fmt, dtype).cpu()
        same.append(torch.equal(found, fake_quantize(x, fmt, dtype)))
    return {"holds": all(same)}


def kernel_again(setting: Setting, name: str) -> Row:
    """Two runs of a layer by kernels, of one set of operands and of another."""
    tensors = random_layer(RECIPES[name]).to(setting.device)
    x = random_input(64, 200, positive="GELU" in name).to(setting.device)
    layers = [make_compute("triton", tensors, x.dtype, setting.device) for _ in range(2)]
    found = [layer.multiply(layer.quantize(x)) for layer in (layers[0], *layers)]
    return {"holds": all(torch.equal(found[0], other) for other in found[1:])}


def packed_again(setting: Setting, model: str) -> Row:
    """Two quantisations of one block by LoRaQ O2 pack the same tensors."""
    transformer = setting.transformer(model, blocks=1)
    layers, chosen = setting.layers(model, transformer), recipe("loraq_o2")
    if setting.dry:
        chosen = replace(chosen, branch=replace(chosen.branch, rank=4, steps=2))
    one, two = (quantize_model(transformer, layers, chosen, progress=None) for _ in range(2))
    parts = ("weight", "left", "right")
    pairs = [
        (getattr(packed, part).codes, getattr(two.layers[name], part).codes)
        for name, packed in one.layers.items()
        for part in parts
    ]
    return {"tensors": len(pairs), "holds": all(torch.equal(a, b) for a, b in pairs)}


@torch.inference_mode()
def latents_again(setting: Setting, model: str) -> Row:
    """Two runs of two steps give the same latents: 16-bit, emulated and by kernels."""
    transformer = setting.transformer(model, blocks=1)
    pipe, config = setting.pipeline(model, transformer), setting.config(model, steps=2)
    text = setting.embeddings(transformer, config, 1)

    def latents() -> torch.Tensor:
        found: torch.Tensor = image_batch(
            pipe, config, [Prompt("a", "nothing")], 0, "latent", embeddings=text
        )
        return found

    same = {"16-bit": torch.equal(latents(), latents())}
    chosen = recipe("rtn")
    made = quantize_model(transformer, setting.layers(model, transformer), chosen, progress=None)
    with made.applied(transformer):
        for mode in ("emulate", "triton"):
            set_compute(transformer, mode)
            same[mode] = torch.equal(latents(), latents())
    return {**same, "holds": all(same.values())}
