"""Keys of a row's products: the hash of exactly what each product depends on.

A key covers the resolved settings, the hash of the weights, the version of the stage's code, and
the parts of the environment that can change the product: of a CPU its threads and its matrix
library, of a GPU its model, libraries and settings (`utils/gpu.py`). `rows.py` lists the products.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from loraq.config import Config, ModelConfig, Recipe
from loraq.data import Prompt, calibration_prompts, data_prompts
from loraq.errors import LoraqError
from loraq.layers.kernel_costs import read_costs
from loraq.metrics.common.result import versions
from loraq.metrics.registry import metric_sources, needs_host, needs_real
from loraq.models.call import embedding_names, encoded_settings
from loraq.models.dtypes import network_dtypes
from loraq.models.family import find_family
from loraq.models.family_file import family_label
from loraq.models.source import pipeline_of, weights_hash
from loraq.quantization.fingerprint import BRANCH_VERSIONS, VERSION
from loraq.runner import generate
from loraq.runner.real_images import real_images
from loraq.runner.rows import ACTIVATIONS, REFERENCE, Row, Stage
from loraq.utils import batch_invariance
from loraq.utils.gpu import gpu_arithmetic
from loraq.utils.hashing import key
from loraq.utils.plain import to_plain

INPUTS_VERSION = 1
LAYERS_VERSION = 1
"""Of the rule that chooses layers without a family's list (`models/discovery/structure.py`)."""
EMBEDDINGS_VERSION = 1
RECORDING_VERSION = 1
DEFAULTS_VERSION = 1
KERNELS_VERSION = 2
BFLOAT16_VERSION = 1
RECORD_VERSION = 1
SENSITIVITY_PROMPTS, SENSITIVITY_STEPS = 8, 4


def make_row(config: Config, arithmetic: Mapping[str, Any] | None = None) -> Row:
    """The row of a configuration with the keys of its products; loads no weights.

    arithmetic: of another GPU (`gpu_arithmetic`), for the keys that its products have.
    """
    device, threads = find_device(config), thread_count(config)
    prompts = data_prompts(config.data)  # before a model is downloaded
    calibration, measuring = calibration_prompts(config.data, config.calibration, config.model)
    model_hash = weights_hash(config.model)
    row = Row(config, model_hash, device, threads, prompts, calibration, measuring)

    installed = versions("torch", "diffusers", "transformers")
    host = {
        "threads": threads,
        "row_invariant": batch_invariance.row_invariant(threads) or "image by image",
    }
    machine: dict[str, Any] = {"device": device, "torch": installed["torch"]}
    if device == "cpu":
        machine["row_invariant"] = host["row_invariant"]
        sampling, measured_on = machine | {"threads": threads}, {}
    else:  # the host computes only metrics
        row = dataclasses.replace(row, arithmetic=arithmetic or gpu_arithmetic())
        machine["gpu"] = row.arithmetic
        sampling = machine
        measured_on = {"host": host} if needs_host(config.metrics.names) else {}
    sampler = {
        "weights": model_hash,
        "model": {
            name: value
            for name, value in _labelled(config.model).items()
            if name not in ("name", "path", "hub_id", "domain", "revision", "dtypes")
        },
        "diffusers": installed["diffusers"],
        "transformers": installed["transformers"],
        "batch_size": config.generate.batch_size,
        **sampling,
        **_text_defaults(config.model),
        **_other_dtypes(config.model),
    }
    capture = {
        "version": INPUTS_VERSION,
        "rows": config.calibration.rows_per_layer,
        "seed": config.calibration.seed,
        **sampler,
    }
    reference = key("images", generate.VERSION, sampler, config.generate.seed, prompts, None)
    keys: dict[str, str] = {Stage.IMAGES: reference, REFERENCE: reference}
    if config.quant is not None:
        keys[Stage.MEASURING_INPUTS] = key("inputs", capture, measuring)
        keys |= _calibration_keys(config.quant, capture, calibration)
        inputs = [keys.get(stage) for stage in ACTIVATIONS[:-1] if stage in keys]
        finder = config.quant.branch.kind, config.quant.branch.select
        keys[Stage.QUANTIZED] = key(
            "quantised",
            VERSION,
            config.quant.identity(),
            model_hash,
            family_label(config.model.family),
            config.model.dtype,
            machine,
            *(inputs or [None]),
            *([BRANCH_VERSIONS[finder]] if finder in BRANCH_VERSIONS else []),
            *(["layers", LAYERS_VERSION] if config.quant.skip is None else []),  # chosen by rule
            *(["oneDNN"] if finder[0] == "loraq" and batch_invariance.use_onednn(device) else []),
        )
        keys[Stage.IMAGES] = key(
            "images",
            generate.VERSION,
            sampler,
            config.generate.seed,
            prompts,
            keys[Stage.QUANTIZED],
            *_compute_key(config, device),
        )
    metric_settings = _metric_settings(config) | measured_on
    record = key("record", RECORD_VERSION, keys, metric_settings, _row_names(config))
    keys[Stage.MEASURED] = key("measured", RECORD_VERSION, keys, metric_settings)
    keys[Stage.RECORD] = record
    keys[Stage.EMBEDDINGS] = _embeddings_key(sampler, config.model, prompts)
    return dataclasses.replace(row, keys=keys)


def _compute_key(config: Config, device: str) -> list[Any]:
    """Key parts of images that kernels compute; empty for emulated ones."""
    if config.compute == "emulate":
        return []
    if config.compute == "triton":
        return ["compute", "triton", KERNELS_VERSION]
    if device != "cpu":  # the table of costs chooses
        return ["compute", "auto", KERNELS_VERSION, read_costs()]
    use_bfloat16 = batch_invariance.use_bfloat16(device, config.model.dtype)
    return ["compute", "bfloat16 products", BFLOAT16_VERSION] if use_bfloat16 else []


def _labelled(model: ModelConfig) -> dict[str, Any]:
    """The model's settings; a family's file by its hash."""
    plain: dict[str, Any] = to_plain(model, new_defaults=False)
    return plain | {"family": family_label(model.family)}


def _text_defaults(model: ModelConfig) -> dict[str, int]:
    """A key part if the text depends on defaults of the pipeline's call; they were others once."""
    unset = set(find_family(model.family).TEXT_DEFAULTS) - set(model.call)
    return {"text_defaults": DEFAULTS_VERSION} if unset else {}


def _other_dtypes(model: ModelConfig) -> dict[str, dict[str, str]]:
    """A key part if networks run in another dtype than the denoiser."""
    found = network_dtypes(model)
    return {"dtypes": found} if found else {}


def _embeddings_key(sampler: dict[str, Any], model: ModelConfig, prompts: Sequence[Prompt]) -> str:
    """Independent of steps and image size, unless a recorded `encode_prompt` takes them.

    The guidance counts only as on or off for embeddings with names; what else a pipeline decides by
    it, a recorded call does not say.
    """
    settings = {
        **{name: value for name, value in sampler.items() if name != "model"},
        **{"dtype": model.dtype, "length": model.max_sequence_length, "call": model.call},
    }
    if embedding_names(pipeline_of(model), model):
        settings["negative"] = model.guided
        return key("embeddings", EMBEDDINGS_VERSION, settings, prompts)
    settings |= {"guidance": model.guidance, "encoded": encoded_settings(pipeline_of(model), model)}
    return key("recorded text", RECORDING_VERSION, settings, prompts)


def _calibration_keys(
    recipe: Recipe, capture: dict[str, Any], calibration: Sequence[Prompt]
) -> dict[str, str]:
    """Keys of the calibration products that the recipe reads; none for a data-free recipe."""
    keys: dict[str, str] = {}
    if recipe.needs_rows:
        keys[Stage.CALIBRATION_INPUTS] = key("inputs", capture, calibration)
    if recipe.needs_moments:
        keys[Stage.MOMENTS] = key("moments", capture, calibration)
    if recipe.needs_sensitivity:
        perturbing = [recipe.identity()[operand] for operand in ("weight", "activation")]
        keys[Stage.SENSITIVITY] = key(
            "sensitivity",
            capture,
            calibration[:SENSITIVITY_PROMPTS],
            SENSITIVITY_STEPS,
            perturbing,
            recipe.skip,
            recipe.branch.share_qkv,
        )
    return keys


def _metric_settings(config: Config) -> dict[str, Any]:
    """The settings, files, packages and weights that the metrics of a record depend on."""
    wanted = config.metrics
    compares = bool(needs_real(wanted.names)) and config.data.real is not None
    settings: dict[str, Any] = {"names": wanted.names, "bootstrap": wanted.bootstrap}
    try:
        real = real_images(config) if compares else None
        settings["real"] = real and real.hash
        settings["sources"] = metric_sources(wanted.names, real, extractor=wanted.extractor)
    except LoraqError:  # no values are measured under this key: the plan's check fails
        settings["missing"] = True
    if config.metrics.analyses:
        settings["analyses"] = sorted(config.metrics.analyses)
    return settings


def _row_names(config: Config) -> list[Any]:
    return [config.experiment, config.row, config.label, config.method]


def find_device(config: Config) -> str:
    """The device to run on, "cpu" or "cuda"; LoraqError if device=cuda and there is none."""
    if config.device == "cpu":
        return "cpu"
    import torch

    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise LoraqError(
            "device=cuda: PyTorch finds no CUDA device. Set device=cpu or device=auto."
        )
    return "cuda" if available else "cpu"


def thread_count(config: Config) -> int:
    """CPU threads: `threads` if it is set, otherwise PyTorch's default."""
    import torch

    return torch.get_num_threads() if config.threads is None else config.threads
