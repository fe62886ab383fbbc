"""Run a pipeline for its images, whatever quantised it: a saved one, one in memory, a GGUF file."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

from loraq.config import Config
from loraq.data import data_prompts
from loraq.errors import LoraqError
from loraq.layouts.importing import find_layout, load_network
from loraq.models.denoisers import TRANSFORMER, denoiser_of, parts
from loraq.models.files import components, read_json
from loraq.models.held import held_memory
from loraq.models.loading import load_pipeline
from loraq.models.networks import network_class
from loraq.models.quantizers import check_package, check_quantizers, quantization_of
from loraq.models.source import resolve_folder
from loraq.runner import generate as generation
from loraq.runner.plan import check_rows, plan_rows
from loraq.runner.product_keys import find_device, thread_count
from loraq.runner.rows import Stage
from loraq.runner.scored import Made
from loraq.runner.session import Session
from loraq.runner.stages import generate_row
from loraq.runner.store import Store
from loraq.utils.process import own_gpu, torch_threads
from loraq.utils.texts import first_line

log = logging.getLogger(__name__)
BY_DIFFUSERS = ("sdnq", "nunchaku_lite")
"""Layouts that diffusers loads too, with the library of the same name; it writes `quant_type` in
the configurations of its own ModelOpt networks."""
GGUF = ".gguf"
"""Suffix of a file with a transformer in llama.cpp's formats."""


def run_saved(config: Config, progress: bool) -> tuple[Path, Made]:
    """Make a saved pipeline's missing images; returns their folder, and how they were made."""
    session = Session(Store(config.output), progress)
    row = plan_rows([config], session.store, last=Stage.IMAGES)[0]
    check_rows([row])
    with session.using(row):
        held = held_memory(denoiser_of(session.pipe(row, text=False)))
        generate_row(session, row)
    images = session.store.path(*row.product(Stage.IMAGES))
    method = _method(denoiser_of(session.pipe(row, text=False)))
    return images, Made(held, generation.generation_seconds(images), method, row.model_hash)


def run_in_memory(
    pipe: Any,
    config: Config,
    images: str | Path | None,
    progress: bool,
) -> tuple[Path, Made]:
    """`run_saved` of a pipeline in memory, into a folder of its own."""
    denoiser, folder = denoiser_of(pipe), None if images is None else Path(images)
    held, prompts = held_memory(denoiser), data_prompts(config.data)
    if folder is None:
        scored = Path(config.output) / "scored"
        scored.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{type(pipe).__name__}-", dir=scored))
    elif folder.exists() and any(folder.iterdir()):
        raise LoraqError(
            f"images='{folder}' holds files already, which may be another pipeline's. Pass a new "
            "folder, or empty this one."
        )
    folder.mkdir(parents=True, exist_ok=True)
    bar = "images" if progress else None
    with torch_threads(thread_count(config)), own_gpu(find_device(config)):
        generation.generate_images(pipe, config.model, prompts, config.generate, folder, bar)
    return folder, Made(held, generation.generation_seconds(folder), _method(denoiser))


def is_emulated(config: Config) -> bool:
    """Whether the row's transformer is in an engine's layout that diffusers does not load here."""
    if config.model.path is None:
        return False
    part = resolve_folder(config.model) / TRANSFORMER
    if not part.is_dir() or find_layout(part) is None:
        return False
    found = quantization_of(read_json(part / "config.json")) or {}
    try:
        check_quantizers(config.model, find_device(config))
    except LoraqError:  # no library, or no GPU
        return True
    return found.get("quant_method") not in BY_DIFFUSERS and "quant_type" not in found


def with_emulated(config: Config) -> Any:
    """The row's pipeline with a transformer that computes what its engine would."""
    import torch

    model, device = config.model, find_device(config)
    check_quantizers(model, device, without=(TRANSFORMER,))
    network = load_network(resolve_folder(model) / TRANSFORMER, getattr(torch, model.dtype))
    log.info(
        "The transformer's layout is emulated: its time is not the engine's, and layers that are "
        "read by value (docs/engines.md) count with the bytes of their values."
    )
    pipe = load_pipeline(model, device, without=(TRANSFORMER,))
    pipe.register_modules(**{TRANSFORMER: network.to(device)})
    return pipe


def _method(denoiser: Any) -> str | None:
    """`quant_method` of a loaded denoiser; None if no quantizer of diffusers loaded it."""
    networks = parts(denoiser).values()
    quantizers = [getattr(network, "hf_quantizer", None) for network in networks]
    configs = [quantizer.quantization_config for quantizer in quantizers if quantizer is not None]
    return (
        str(getattr(configs[0].quant_method, "value", configs[0].quant_method)) if configs else None
    )


def with_gguf(config: Config, file: Path) -> Any:
    """The row's pipeline with its transformer from a GGUF file, as diffusers reads it.

    LoraqError for a class of transformers that diffusers does not read from single files.
    """
    check_package("gguf", f"'{file}' is a GGUF file")
    import torch
    from diffusers import GGUFQuantizationConfig
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    model = config.model
    folder = resolve_folder(model)
    values = read_json(folder / TRANSFORMER / "config.json")
    network = network_class(*components(folder)[TRANSFORMER], values)
    if not any(parent.__name__ in SINGLE_FILE_LOADABLE_CLASSES for parent in network.__mro__):
        raise LoraqError(
            f"diffusers reads no {network.__name__} from a single file, so '{file}' cannot be "
            "loaded. Quantise the pipeline in memory, and pass it to loraq.score(pipe)."
        )
    dtype = getattr(torch, model.dtype)
    try:
        transformer = network.from_single_file(
            str(file),
            config=str(folder),
            subfolder=TRANSFORMER,
            quantization_config=GGUFQuantizationConfig(compute_dtype=dtype),
            torch_dtype=dtype,
            local_files_only=True,
        )
    except Exception as error:  # whatever a damaged file, or one of another model, raises
        raise LoraqError(
            f"'{file}' does not load as a {network.__name__}: {first_line(error)[:300]}\n  Restore "
            "the file, or set model.path to the pipeline that it belongs to."
        ) from error
    return load_pipeline(model, find_device(config), transformer=transformer)
