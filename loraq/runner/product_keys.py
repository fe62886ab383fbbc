"""Keys of a row's products: the hash of exactly what each product depends on.

A key covers resolved settings, the hash of the weights, the version of the stage's code, and what
matters of the environment. `rows.py` lists the products.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Sequence
from typing import Any

from loraq.config import Config, ModelConfig, Recipe
from loraq.data import Prompt, calibration_prompts, data_prompts, prompts_path, real_image_paths
from loraq.errors import LoraqError
from loraq.metrics.common.features import choose_extractor
from loraq.metrics.registry import find_metric
from loraq.models.source import weights_hash
from loraq.quantization.fingerprint import BRANCH_VERSIONS, VERSION
from loraq.runner import generate
from loraq.runner.rows import ACTIVATIONS, REFERENCE, Row, Stage
from loraq.utils import batch_invariance
from loraq.utils.assets import resolve_asset
from loraq.utils.hashing import cached_hash, key
from loraq.utils.plain import to_plain

INPUTS_VERSION = 1
EMBEDDINGS_VERSION = 1
KERNELS_VERSION = 1
RECORD_VERSION = 1
SENSITIVITY_PROMPTS, SENSITIVITY_STEPS = 8, 4


def keyed(config: Config) -> Row:
    """The row of a configuration with its keys; loads no model and changes nothing."""
    device, threads = find_device(config), thread_count(config)
    model_hash = weights_hash(config.model)
    prompts = data_prompts(config.data)
    calibration, measuring = calibration_prompts(config.data, config.calibration, config.model)
    row = Row(config, model_hash, device, threads, prompts, calibration, measuring)

    machine = {
        "device": device,
        "torch": importlib.metadata.version("torch"),
        "row_invariant": batch_invariance.row_invariant(threads) or "image by image",
    }
    sampler = {
        "weights": model_hash,
        "model": {
            name: value
            for name, value in to_plain(config.model, new_defaults=False).items()
            if name not in ("name", "path", "hub_id")
        },
        "diffusers": importlib.metadata.version("diffusers"),
        "transformers": importlib.metadata.version("transformers"),
        "batch_size": config.generate.batch_size,
        "threads": threads,
        **machine,
    }
    drawing = {
        "version": INPUTS_VERSION,
        "rows": config.calibration.rows_per_layer,
        "seed": config.calibration.seed,
        **sampler,
    }
    reference = key("images", generate.VERSION, sampler, config.generate.seed, prompts, None)
    keys: dict[str, str] = {Stage.IMAGES: reference, REFERENCE: reference}
    if config.quant is not None:
        keys[Stage.MEASURING_INPUTS] = key("inputs", drawing, measuring)
        keys |= _calibration_keys(config.quant, drawing, calibration)
        read = [keys.get(stage) for stage in ACTIVATIONS[:-1] if stage in keys]
        found_by = config.quant.branch.kind, config.quant.branch.select
        keys[Stage.QUANTIZED] = key(
            *("quantised", VERSION, config.quant.identity(), model_hash, config.model.family),
            *(config.model.dtype, machine, *(read or [None])),
            *([BRANCH_VERSIONS[found_by]] if found_by in BRANCH_VERSIONS else []),
            *(["oneDNN"] if found_by[0] == "loraq" and batch_invariance.use_onednn(device) else []),
        )
        keys[Stage.IMAGES] = key(
            *("images", generate.VERSION, sampler, config.generate.seed, prompts),
            *(keys[Stage.QUANTIZED], *_kernels(config, device)),
        )
    judging = _judging(config, prompts)
    record = key("record", RECORD_VERSION, keys, judging, _named(config))
    keys[Stage.MEASURED] = key("measured", RECORD_VERSION, keys, judging)
    keys[Stage.RECORD] = record
    keys[Stage.EMBEDDINGS] = _embeddings_key(sampler, config.model, prompts)
    return dataclasses.replace(row, keys=keys)


def _kernels(config: Config, device: str) -> list[Any]:
    """What makes images differ from emulated ones: nothing where no kernel runs."""
    if config.compute == "emulate":
        return []
    if device != "cpu" or config.compute != "auto":
        return ["compute", config.compute, KERNELS_VERSION]
    use_bfloat16 = batch_invariance.use_bfloat16(device, config.model.dtype)
    return ["compute", "bfloat16 products", KERNELS_VERSION] if use_bfloat16 else []


def _embeddings_key(sampler: dict[str, Any], model: ModelConfig, prompts: Sequence[Prompt]) -> str:
    """Steps, size and guidance change no embedding, but for guidance being on or off."""
    settings = {
        **{name: value for name, value in sampler.items() if name != "model"},
        **{"dtype": model.dtype, "length": model.max_sequence_length, "call": model.call},
        "negative": model.guidance > 1.0,
    }
    return key("embeddings", EMBEDDINGS_VERSION, settings, prompts)


def _calibration_keys(
    recipe: Recipe, drawing: dict[str, Any], calibration: Sequence[Prompt]
) -> dict[str, str]:
    """Keys of the activations that the recipe reads; none for a data-free one."""
    keys: dict[str, str] = {}
    if recipe.needs_rows:
        keys[Stage.CALIBRATION_INPUTS] = key("inputs", drawing, calibration)
    if recipe.needs_moments:
        keys[Stage.MOMENTS] = key("moments", drawing, calibration)
    if recipe.needs_sensitivity:
        perturbing = [recipe.identity()[operand] for operand in ("weight", "activation")]
        keys[Stage.SENSITIVITY] = key(
            *("sensitivity", drawing, calibration[:SENSITIVITY_PROMPTS], SENSITIVITY_STEPS),
            *(perturbing, recipe.skip, recipe.branch.share_qkv),
        )
    return keys


def _judging(config: Config, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What the metrics of a record depend on."""
    real: Any = config.data.real
    extractor = config.metrics.extractor
    if real == "set":
        found = real_image_paths(
            config.data.set, prompts_path(config.data), [p.name for p in prompts]
        )
        real = {image.stem: cached_hash(image) for image in found}
        extractor = choose_extractor(extractor)
    elif real is not None:
        path = resolve_asset(real)
        if path.is_file():  # features: the file itself says which extractor made them
            real = cached_hash(path)
        else:  # images, whatever their folder is called; `auto` depends on what weights are there
            real = {image.name: cached_hash(image) for image in sorted(path.glob("*.png"))}
            extractor = choose_extractor(extractor)
    judged = {
        "metrics": [(name, find_metric(name).VERSION) for name in config.metrics.names],
        "extractor": extractor,
        "bootstrap": config.metrics.bootstrap,
        "real": real,
    }
    if config.metrics.analyses:
        judged["analyses"] = sorted(config.metrics.analyses)
    return judged


def _named(config: Config) -> list[Any]:
    return [config.experiment, config.row, config.label, config.method]


def find_device(config: Config) -> str:
    """cpu or cuda, as the config asks or as there is one; LoraqError where it is missing."""
    if config.device == "cpu":
        return "cpu"
    import torch

    there = torch.cuda.is_available()
    if config.device == "cuda" and not there:
        raise LoraqError("device=cuda: PyTorch finds no CUDA device here. Set device=cpu or auto.")
    return "cuda" if there else "cpu"


def thread_count(config: Config) -> int:
    """Threads of the CPU's products: as asked for, else as many as PyTorch takes."""
    import torch

    return torch.get_num_threads() if config.threads is None else config.threads
