"""Seconds and bytes of a stage that nobody has timed yet, from the cost model.

Steps of the transformer, the decoder and the sizes of products are counted on the meta device
(`quantization/planned.py`). Assumed are the rates of the device (`utils/rates.py`), the seconds of
quantising and of the metrics (below).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from loraq.config import ModelConfig, Recipe
from loraq.metrics import find_metric
from loraq.metrics.common.reading import MOST_THREADS
from loraq.models.files import components, read_header, read_json, weight_files
from loraq.models.layers import Layer, list_layers
from loraq.models.loading import architecture, latent_scale
from loraq.models.networks import quiet_diffusers
from loraq.models.source import resolve_folder
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
        pixels = model.height * model.width
        return count * image_seconds(row, rates), count * pixels * PNG_BYTES
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
        return count * model.steps * step, sum(4 * width * (width + 1) for width in widths)
    rows = row.config.calibration.rows_per_layer
    return count * model.steps * step, sum(2 * rows * width for width in widths)


def image_seconds(row: Row, rates: Rates) -> float:
    """Seconds of one image: its share of the steps of a batch, and its decoding."""
    decoding = _decoder_work(_Question.of(row.config.model)).seconds(rates)
    return row.config.model.steps * _step_seconds(row, rates, row.recipe) + decoding


def text_seconds(model: ModelConfig, rates: Rates) -> float:
    """Seconds to embed one prompt, and an empty one with guidance."""
    folder, parameters = resolve_folder(model), 0
    for part, (library, _) in components(folder).items():
        if part.startswith("text_encoder"):
            for path in weight_files(folder / part, library, model.variant):
                parameters += sum(math.prod(shape) for _, shape in read_header(path).values())
    prompts = 2 if model.guidance > 1 else 1
    tokens = prompts * model.max_sequence_length
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
    build = functools.partial(_build, model)
    blocks = read_json(resolve_folder(model) / "transformer" / "config.json").get("num_layers", 1)
    side = max(1, round((model.height * model.width) ** 0.5 / latent_scale(model)))
    images = asked.images * (2 if model.guidance > 1 else 1)
    shape = StepShape(images, side, model.max_sequence_length, getattr(torch, model.dtype))
    return step_work(build, int(blocks), model.family, shape, asked.recipe, fused=True).work


def _build(model: ModelConfig, blocks: int) -> nn.Module:
    transformer: nn.Module = architecture(model, blocks=blocks)
    return transformer


@functools.lru_cache(maxsize=16)
def _decoder_work(asked: _Question) -> Work:
    """Decoding one image: the pipeline decodes one at a time."""
    model, folder = asked.model, resolve_folder(asked.model)
    kind = getattr(quiet_diffusers(), components(folder)["vae"][1])
    dtype, scale = getattr(torch, model.dtype), latent_scale(model)
    with torch.device("meta"), torch.no_grad():
        vae = kind.from_config(read_json(folder / "vae" / "config.json")).to(dtype).eval()
        latents = torch.empty(
            1, vae.config.latent_channels, model.height // scale, model.width // scale, dtype=dtype
        )
        with Counted() as counted:
            vae.decode(latents)
    return counted.work


def _layers(model: ModelConfig, skip: Sequence[str] | None = None) -> list[Layer]:
    return list_layers(_transformer(_Question.of(model)), model.family, skip)


@functools.lru_cache(maxsize=2)
def _transformer(asked: _Question) -> nn.Module:
    transformer: nn.Module = architecture(asked.model)
    return transformer


def _packed_bytes(model: ModelConfig, recipe: Recipe) -> float:
    layers = _layers(model, recipe.skip)
    packed = QuantizedModel(planned_layers(layers, recipe))
    return packed.nbytes + sum(4 * layer.shape[0] for layer in layers)


def _text_bytes(model: ModelConfig) -> float:
    """At most: tokens that no prompt of a batch needs are not stored."""
    config = read_json(resolve_folder(model) / "transformer" / "config.json")
    width = int(config.get("caption_channels", 4096))
    return float(model.max_sequence_length * width * getattr(torch, model.dtype).itemsize)


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
    megapixels = model.height * model.width / 1e6
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
            seconds += images * model.steps * each
    return seconds
