"""Seconds and bytes of a stage that nobody has timed yet, from the cost model.

Steps of the transformer, the decoder and the sizes of products are counted on the meta device
(`quantization/planned.py`). Assumed are the rates of the device (`utils/rates.py`), the seconds of
quantising and of the metrics (below).
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from loraq.config import ModelConfig, Recipe
from loraq.metrics import find_metric
from loraq.metrics.common.reading import MOST_THREADS
from loraq.models.call import frames_of
from loraq.models.denoisers import parts
from loraq.models.files import components, read_header, read_json, weight_files
from loraq.models.layers import Layer, list_layers
from loraq.models.loading import architecture, denoisers_in, latent_sizes, text_parts
from loraq.models.networks import network_class
from loraq.models.source import pipeline_of, resolve_folder
from loraq.quantization.grouping import make_units
from loraq.quantization.model import QuantizedModel
from loraq.quantization.planned import StepShape, planned_layers, step_work
from loraq.runner.product_keys import SENSITIVITY_PROMPTS, SENSITIVITY_STEPS
from loraq.runner.rows import Row, Stage
from loraq.utils.rates import CPU, Rates
from loraq.utils.work import Counted, Kernel, Work

CPU_EMULATION = 1.2
"""Time of an emulated step on a CPU over the 16-bit step; both multiply in float32
(results/bench/generation_*.json)."""
SOLVER_LAUNCHES = 2e4
"""Launches to solve one unit of layers on a GPU, in up to a hundred rounds."""
IMAGE_SECONDS, MEGAPIXEL_SECONDS = 0.1, 1.5
"""All metrics of an image on two cores: networks that resize it, and those that do not."""
READ_SECONDS = 0.05
"""To decode a megapixel in one thread; with a GPU, the metrics wait for their images."""
PNG_BYTES = 1.5  # per pixel
TOKENS, WIDTH = 256, 4096
"""Of a prompt's embeddings, where the model's files do not say."""


def stage_units(row: Row, stage: Stage) -> int:
    """The number of prompts of a stage; 1 for a product that is not made prompt by prompt."""
    prompts: dict[Stage, Sequence[object]] = {
        Stage.CALIBRATION_INPUTS: row.calibration,
        Stage.MOMENTS: row.calibration,
        Stage.MEASURING_INPUTS: row.measuring,
        Stage.IMAGES: row.prompts,
        Stage.EMBEDDINGS: row.prompts,
    }
    return len(prompts[stage]) if stage in prompts else 1


def forecast(row: Row, stage: Stage, rates: Rates) -> tuple[float, float]:
    """(seconds, bytes) of one stage of the row on a device of these rates."""
    model, count = row.config.model, stage_units(row, stage)
    if stage is Stage.EMBEDDINGS:
        return text_seconds(model, rates) * count, count * _text_bytes(model)
    if stage is Stage.IMAGES:
        return count * image_seconds(row, rates), count * 1e6 * _megapixels(model) * PNG_BYTES
    if stage is Stage.QUANTIZED:
        assert row.recipe is not None
        return _solver_seconds(model, row.recipe, rates), _packed_bytes(model, row.recipe)
    if stage is Stage.RECORD:
        return 0.1, 1e5
    step = _step_seconds(row, rates, None)
    if stage is Stage.MEASURED:
        return _measuring_seconds(row, rates, step), 1e5
    if stage is Stage.SENSITIVITY:
        forwards = SENSITIVITY_PROMPTS * SENSITIVITY_STEPS
        return step * forwards * len(make_units(_layers(model), True)), 1e4
    widths = {layer.shares_input: layer.shape[1] for layer in _layers(model, skip=())}.values()
    if stage is Stage.MOMENTS:
        return count * model.step_count * step, sum(4 * width * (width + 1) for width in widths)
    rows = row.config.calibration.rows_per_layer
    return count * model.step_count * step, sum(2 * rows * width for width in widths)


def image_seconds(row: Row, rates: Rates) -> float:
    """Seconds of one image: its share of the steps of a batch, and its decoding."""
    decoding = _decoder_work(_Question.of(row.config.model)).seconds(rates)
    return row.config.model.step_count * _step_seconds(row, rates, row.recipe) + decoding


def text_seconds(model: ModelConfig, rates: Rates) -> float:
    """Seconds to embed one prompt, and an empty one with guidance."""
    folder, parameters = resolve_folder(model), 0
    listed = components(folder)
    for part in text_parts(model):
        for path in weight_files(folder / part, listed[part][0], model.variant):
            parameters += sum(math.prod(shape) for _, shape in read_header(path).values())
    tokens = (2 if model.guided else 1) * (model.max_sequence_length or TOKENS)
    return Kernel("text encoder", 2 * parameters * tokens, 2 * parameters // 8).seconds(rates)


@dataclass(frozen=True)
class _Question:
    """A model and a recipe as the key of a cache: equal if all that a forward depends on is."""

    text: str
    model: ModelConfig = field(compare=False)
    recipe: Recipe | None = field(compare=False)
    images: int = 1

    @classmethod
    def of(cls, model: ModelConfig, recipe: Recipe | None = None, images: int = 1) -> _Question:
        text = f"{model} {images}"
        if recipe is not None:
            branch, unbranched = recipe.branch, recipe.branch.kind == "none"
            text += f" {recipe.formats()} {recipe.transform} {recipe.skip} {unbranched}"
            text += f" {recipe.requantize_intermediate} {branch.share_qkv}"
            text += f" {branch.rank} {branch.budget} {branch.budget_rank}"
        return cls(text, model, recipe, images)


def _step_seconds(row: Row, rates: Rates, recipe: Recipe | None) -> float:
    """Seconds of one step per image, in the row's batches."""
    images = min(row.config.generate.batch_size, max(1, len(row.prompts)))
    if rates is CPU:
        work = _step_work(_Question.of(row.config.model, None, images))
        return work.flops / rates.flops / images * (CPU_EMULATION if recipe is not None else 1)
    return _step_work(_Question.of(row.config.model, recipe, images)).seconds(rates) / images


@functools.lru_cache(maxsize=64)
def _step_work(asked: _Question) -> Work:
    model = asked.model
    config = _transformer_config(model)
    counts = [name for name in config if re.fullmatch(r"num_(\w+_)?layers", name)]
    blocks = int(config["num_layers"]) if counts == ["num_layers"] else 1  # 1: counted as it is
    build = functools.partial(_build, model, counts == ["num_layers"])
    images = asked.images * (2 if model.guided and not config.get("guidance_embeds") else 1)
    tokens = model.max_sequence_length or TOKENS
    frames, height, width = latent_sizes(model) or (1, 1, 1)
    if model.size is None:  # sound: as many latents as the transformer was made for
        height = width = max(1, round(config.get("sample_size", 1) ** 0.5))
    side = max(1, round((frames * height * width) ** 0.5))
    shape = StepShape(images, side, tokens, getattr(torch, model.dtype))
    try:
        return step_work(build, blocks, model.family, shape, asked.recipe, fused=True).work
    except Exception:  # a forward whose arguments nobody foresaw: each weight once for each token
        denoiser = next(iter(parts(_transformer(_Question.of(model))).values()))
        weights = sum(parameter.numel() for parameter in denoiser.parameters())
        kernel = Kernel("denoiser", 2 * weights * images * (side**2 // 4 + tokens), 2 * weights)
        return Work(Counter([kernel]))


def _build(model: ModelConfig, alike: bool, blocks: int) -> nn.Module:
    """The transformer, the first of two experts; with `blocks` blocks if they are all alike."""
    return next(iter(parts(architecture(model, blocks=blocks if alike else None)).values()))


def _transformer_config(model: ModelConfig) -> dict[str, Any]:
    return read_json(resolve_folder(model) / denoisers_in(model)[0] / "config.json")


def _megapixels(model: ModelConfig) -> float:
    """Of an image, or of all frames of a video."""
    if model.size is None:
        return 0.0
    return frames_of(pipeline_of(model), model) * math.prod(model.size) / 1e6


@functools.lru_cache(maxsize=16)
def _decoder_work(asked: _Question) -> Work:
    """Decoding one image or video: the pipeline decodes one at a time. Nothing for sound."""
    model, folder = asked.model, resolve_folder(asked.model)
    if "vae" not in (listed := components(folder)):
        return Work()
    values = read_json(folder / "vae" / "config.json")
    dtype, channels = (
        getattr(torch, model.dtype),
        values.get("latent_channels", values.get("z_dim")),
    )
    if not isinstance(channels, int) or model.size is None:
        return Work()
    frames, height, width = latent_sizes(model) or (1, 1, 1)
    with torch.device("meta"), torch.no_grad():
        vae = network_class(*listed["vae"], values).from_config(values)
        nn.Module.to(vae, dtype).eval()  # without diffusers' word on parts in float32
        for shape in ((height, width), (frames, height, width)):
            with contextlib.suppress(Exception), Counted() as counted:
                vae.decode(torch.empty(1, channels, *shape, dtype=dtype))
                return counted.work
    return Work()


def _layers(model: ModelConfig, skip: Sequence[str] | None = None) -> list[Layer]:
    return list_layers(_transformer(_Question.of(model)), model.family, skip)


@functools.lru_cache(maxsize=2)
def _transformer(asked: _Question) -> nn.Module:
    return architecture(asked.model)


def _packed_bytes(model: ModelConfig, recipe: Recipe) -> float:
    layers = _layers(model, recipe.skip)
    packed = QuantizedModel(planned_layers(layers, recipe))
    return packed.nbytes + sum(4 * layer.shape[0] for layer in layers)


def _text_bytes(model: ModelConfig) -> float:
    """At most: tokens that no prompt of a batch needs are not stored."""
    widths = ("caption_channels", "joint_attention_dim", "cross_attention_dim", "text_dim")
    config = _transformer_config(model)
    width = next((config[name] for name in widths if isinstance(config.get(name), int)), WIDTH)
    tokens = model.max_sequence_length or TOKENS
    return float(tokens * width * getattr(torch, model.dtype).itemsize)


def _solver_seconds(model: ModelConfig, recipe: Recipe, rates: Rates) -> float:
    """By the passes over the weights; on a GPU also by the launches of small solvers."""
    layers = _layers(model, recipe.skip)
    weights, units = sum(layer.shape[0] * layer.shape[1] for layer in layers), len(layers)
    each = {"none": 2e-8, "svd": 3e-8}.get(recipe.branch.kind, 5e-7)
    each += 3e-6 if recipe.rounding.kind == "gptq" else 0
    each += 1e-5 if recipe.needs_rows else 0
    seconds = weights * each * CPU.bandwidth / rates.bandwidth
    if rates is not CPU and recipe.branch.kind not in ("none", "svd"):
        seconds = 2 * seconds + units * SOLVER_LAUNCHES * rates.launch
    return seconds


def _measuring_seconds(row: Row, rates: Rates, step: float) -> float:
    """The metrics of all images, the errors of layers and, if they are asked for, of steps."""
    model, settings = row.config.model, row.config.metrics
    megapixels = _megapixels(model)
    if rates is CPU:
        each = IMAGE_SECONDS + MEGAPIXEL_SECONDS * megapixels
    else:
        needs = [find_metric(name).NEEDS for name in settings.names]
        read = len(needs) + needs.count("reference")  # these read two images
        each = read * READ_SECONDS * megapixels / (settings.workers or MOST_THREADS)
    seconds = len(row.prompts) * each
    if row.recipe is not None:
        layers = _layers(model, row.recipe.skip)
        weights = sum(layer.shape[0] * layer.shape[1] for layer in layers)
        # two outputs of every layer on the captured rows
        seconds += 4 * weights * row.config.calibration.rows_per_layer / rates.flops
        if "steps" in settings.analyses:
            passes = 1 + len({layer.role for layer in layers})  # to record, and for each role
            images = min(row.config.generate.batch_size, len(row.measuring))
            each = passes * step + _step_seconds(row, rates, row.recipe)
            seconds += images * model.step_count * each
    return seconds
