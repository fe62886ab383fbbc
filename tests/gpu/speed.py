"""What is measured: one block, a whole run of 20 steps, and quantising, at the published shapes."""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from experiments.bench.forward import FAMILIES, MX, TORCHAO, quantize_with_torchao_
from experiments.bench.timing import alternate
from loraq import recipe
from loraq.config import Recipe
from loraq.data import Prompt
from loraq.layers.linear import set_compute
from loraq.models.layers import Layer
from loraq.quantization.activations import Activations
from loraq.quantization.calibration import InputCapture, MomentCapture
from loraq.quantization.quantizer import quantize_model
from loraq.runner.generate import image_batch
from loraq.utils.memory import held_bytes, peak
from tests.gpu.setting import Item, Row, Setting, synchronize

NVFP4 = ("format@quant.weight=nvfp4", "format@quant.activation=nvfp4")
NVFP4 += ("quant.activation.tensor_scale=token",)
RECIPES: dict[str, tuple[str, ...]] = {
    "int4, W4A8 branch": ("lqer", "format@quant.branch_weight=int4"),
    "mxfp4, mxfp8 branch": ("lqer", *MX),
    "nvfp4, mxfp8 branch": ("lqer", *MX, *NVFP4),
}
MODES = {"emulated": "emulate", "kernels": "triton"}
METHODS = ("loraq_o2", "loftq", "loraq_best", "rtn", "lqer", "loraq_o1", "svdquant", "gptq")
MODEL_SECONDS = 90
"""A model is quantised as a whole if its first block predicts less; else that block is the row."""


def blocks(setting: Setting) -> Iterator[Item]:
    """A block of each model at each batch, every way in alternation."""
    for images in setting.batches:
        for model in setting.models:
            call = functools.partial(block, setting, model, images)
            yield Item(f"a block of {model}, {images} images", call)


@torch.inference_mode()
def block(setting: Setting, model: str, images: int) -> Row:
    """Seconds and memory above the weights of a forward of one block: 16-bit, LoRaQ, others."""
    ways: dict[str, Callable[[], Any]] = {}
    failed: dict[str, str] = {}
    for name, build in builders().items():
        transformer = setting.transformer(model, blocks=1)
        try:
            build(setting, transformer, setting.layers(model, transformer))
            call = functools.partial(transformer, **setting.inputs(transformer, images))
            call()
        except Exception as error:  # a library that is missing or does not support these layers
            failed[name] = first_line(error)
        else:
            ways[name] = call
    if "16-bit" not in ways:
        raise RuntimeError(f"the 16-bit block does not run: {failed['16-bit']}")
    found = alternate(ways, setting.repeats, setting.device)
    peaks, held = {}, held_bytes(setting.device.type)
    for name, call in ways.items():
        with peak(setting.device.type) as top:
            call()
        peaks[name] = max(0, top.top - held)
    rows = {
        name: {"seconds": row["median_seconds"], "ratio": row["ratio"], "peak_bytes": peaks[name]}
        for name, row in found.items()
    }
    return {"model": model, "images": images, "ways": rows, "failed": failed}


def builders() -> dict[str, Callable[[Setting, nn.Module, list[Layer]], None]]:
    """Way → a function that replaces the layers of a transformer in place; 16-bit is the first."""
    found: dict[str, Callable[[Setting, nn.Module, list[Layer]], None]] = {
        "16-bit": lambda _setting, _transformer, _layers: None
    }
    for name in RECIPES:
        for mode in MODES:
            found[f"{name}, {mode}"] = functools.partial(_loraq, name, mode)
    if importlib.util.find_spec("torchao") is not None:
        for name, weight in TORCHAO.items():
            found[name] = functools.partial(_torchao, weight)
    if importlib.util.find_spec("bitsandbytes") is not None:
        found["bitsandbytes nf4"] = _bitsandbytes
    return found


def asked_recipe(setting: Setting, name: str) -> Recipe:
    """The recipe of a way, with rank 4 in a dry run."""
    chosen: Recipe = recipe(*RECIPES[name])
    return replace(chosen, branch=replace(chosen.branch, rank=4)) if setting.dry else chosen


def _loraq(
    name: str, mode: str, setting: Setting, transformer: nn.Module, layers: list[Layer]
) -> None:
    made = quantize_model(transformer, layers, asked_recipe(setting, name), progress=None)
    made.apply(transformer)
    set_compute(transformer, MODES[mode])  # type: ignore[arg-type]


def _torchao(weight: str, _setting: Setting, transformer: nn.Module, layers: list[Layer]) -> None:
    quantize_with_torchao_(transformer, layers, weight)


def _bitsandbytes(setting: Setting, transformer: nn.Module, layers: list[Layer]) -> None:
    import bitsandbytes  # type: ignore[import-not-found]

    for layer in layers:
        old = transformer.get_submodule(layer.name)
        if isinstance(old, nn.Linear):
            out, width = layer.shape
            new = bitsandbytes.nn.Linear4bit(
                width, out, old.bias is not None, setting.dtype, quant_type="nf4"
            )
            new.load_state_dict(old.state_dict())
            transformer.set_submodule(layer.name, new.to(setting.device))


def loops(setting: Setting) -> Iterator[Item]:
    """Runs of 20 steps with decoding: the smallest batch first for time, all ways of each model."""
    for model in setting.models:
        for way in ("16-bit", *(f"int4, W4A8 branch, {mode}" for mode in reversed(MODES))):
            for images in sorted(setting.batches):
                call = functools.partial(loop, setting, model, way, images)
                yield Item(f"20 steps of {model}, {way}, {images} images", call)


@torch.inference_mode()
def loop(setting: Setting, model: str, way: str, images: int) -> Row:
    """Seconds from embeddings to images, images per minute, peak bytes."""
    transformer = setting.transformer(model)
    builders()[way](setting, transformer, setting.layers(model, transformer))
    pipe, config = setting.pipeline(model, transformer), setting.config(model)
    prompts = [Prompt(f"p{number}", "nothing") for number in range(images)]
    text = setting.embeddings(transformer, config, images)

    def images_of(steps: int) -> Any:
        return image_batch(pipe, replace(config, steps=steps), prompts, 0, embeddings=text)

    images_of(min(2, config.steps))  # compiles kernels
    synchronize(setting.device)
    with peak(setting.device.type) as top:
        begin = time.perf_counter()
        images_of(config.steps)
        synchronize(setting.device)
        seconds = time.perf_counter() - begin
    per_minute = 60 * images / seconds
    return {
        **{"model": model, "way": way, "images": images, "steps": config.steps},
        **{"seconds": seconds, "images_per_minute": per_minute, "peak_bytes": top.top},
    }


def quantising(setting: Setting) -> Iterator[Item]:
    """Every model by every method."""
    for method in METHODS:
        for model in setting.models:
            call = functools.partial(quantise, setting, model, method)
            yield Item(f"quantise {model} by {method}", call)


def quantise(setting: Setting, model: str, method: str) -> Row:
    """Seconds for the whole model, or for one block of a method that takes minutes."""
    row = quantise_blocks(setting, model, method, 1)
    if setting.blocks(model) * row["seconds"] < MODEL_SECONDS:
        row = quantise_blocks(setting, model, method, None)
    return row


@torch.no_grad()
def quantise_blocks(setting: Setting, model: str, method: str, count: int | None) -> Row:
    """Seconds to quantise `count` blocks (None: all) without the forwards of calibration; peak."""
    transformer = setting.transformer(model, blocks=count)
    layers, chosen = setting.layers(model, transformer), recipe(method)
    if setting.dry and chosen.branch.kind != "none":
        chosen = replace(chosen, branch=replace(chosen.branch, rank=4))
    read = captured(setting, transformer, layers) if chosen.needs_calibration else None
    synchronize(setting.device)
    with peak(setting.device.type) as top:
        begin = time.perf_counter()
        made = quantize_model(
            transformer, layers, chosen, read, progress=None, family=FAMILIES[model]
        )
        synchronize(setting.device)
        seconds = time.perf_counter() - begin
    blocks = setting.blocks(model) if count is None else count
    return {
        **{"model": model, "method": method, "blocks": blocks, "seconds": seconds},
        **{"bits_per_weight": made.bits_per_weight, "peak_bytes": top.top},
    }


def captured(setting: Setting, transformer: nn.Module, layers: list[Layer]) -> Activations:
    """Rows and moments of one forward of two images with guidance."""
    inputs = setting.inputs(transformer, 2)
    rows, moments = (
        InputCapture(transformer, layers, 2048, 1, 0),
        MomentCapture(transformer, layers),
    )
    with rows, moments:
        transformer(**inputs)
    held = {name: x.to(setting.device) for name, x in rows.inputs().items()}
    return Activations(rows=held, moments=moments.moments())


def first_line(error: BaseException) -> str:
    """The kind and the first line of an error."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"
