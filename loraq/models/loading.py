"""Load a diffusers pipeline, or its transformer without weights. No remote code, no pickles."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loraq.config import ModelConfig
from loraq.errors import LoraqError, unknown
from loraq.models.contents import check_contents
from loraq.models.files import components, read_json
from loraq.models.finite import check_pipeline
from loraq.models.layers import find_family
from loraq.models.networks import quiet_diffusers
from loraq.models.source import resolve_folder

RESERVED = {
    "prompt": "prompts are set with data=…",
    "num_inference_steps": "set model.steps",
    "guidance_scale": "set model.guidance",
    "height": "set model.height",
    "width": "set model.width",
    "max_sequence_length": "set model.max_sequence_length",
    "generator": "every image has its own seed (generate.seed)",
    "output_type": "images are saved as PNG",
}
"""Arguments of the pipeline's `__call__` that a run sets, with the setting to use instead."""


def load_pipeline(
    model: ModelConfig, device: str = "cpu", without: Sequence[str] = (), **given: Any
) -> Any:
    """The unmodified diffusers pipeline in the config's dtype on `device`, without progress bars.

    without: components that are not loaded (None).
    given: components that are passed to `from_pretrained` instead of being loaded.
    LoraqError if a file or a tensor is missing or damaged, or if `model` does not fit the pipeline.
    """
    import torch

    folder, table = resolve_folder(model), find_family(model.family)
    check_contents(model, components(folder).keys() - {*without})
    pipeline = getattr(quiet_diffusers(), table.PIPELINE)
    check_model_call(model)
    try:
        pipe = pipeline.from_pretrained(
            str(folder),
            dtype=getattr(torch, model.dtype),
            variant=model.variant,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            **dict.fromkeys(without),
            **given,
        )
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LoraqError(
            f"'{folder}' does not load as {table.PIPELINE}: {reason[:300]}\n"
            "  Restore the folder, or set model.path to a complete one."
        ) from error
    pipe.set_progress_bar_config(disable=True)
    if pipe.vae is not None:
        pipe.vae.enable_slicing()  # one image at a time: independent of its batch
    pipe.to(device)
    check_pipeline(pipe)
    return pipe


def check_model_call(model: ModelConfig) -> None:
    """LoraqError for an argument in `model.call` that is unknown, unused or set by the run."""
    if not model.call:
        return
    pipeline = getattr(quiet_diffusers(), find_family(model.family).PIPELINE)
    check_call(pipeline.__call__, model.call, RESERVED, "model.call")
    if model.call.get("negative_prompt") and model.guidance <= 1:
        raise LoraqError(
            f"model.call.negative_prompt has no effect with model.guidance={model.guidance:g}; "
            "it needs a guidance above 1. Raise it, or leave the negative prompt out."
        )


def check_size(model: ModelConfig) -> None:
    """LoraqError for a height or width that the pipeline, its decoder or its patches cannot make.

    With resolution binning, the pipeline itself chooses a size and resizes the images.
    """
    if model.call.get("use_resolution_binning", True):
        return
    file = resolve_folder(model) / "transformer" / "config.json"
    patch = read_json(file).get("patch_size")
    if not isinstance(patch, int):
        raise _unusable(file, "patch_size")
    step = latent_scale(model) * patch
    step = math.lcm(step, find_family(model.family).SIZE_MULTIPLE)
    for name in ("height", "width"):
        if (size := getattr(model, name)) % step:
            near = max(step, round(size / step) * step)
            raise LoraqError(
                f"model.{name}={size} is no multiple of {step}, the pixels of a patch of this "
                f"model. Set model.{name}={near}, for example."
            )


def latent_scale(model: ModelConfig) -> int:
    """Pixels of an image's side per latent; LoraqError if the autoencoder's file does not say."""
    file = resolve_folder(model) / "vae" / "config.json"
    vae = read_json(file)
    scales = vae.get("encoder_block_out_channels") or vae.get("block_out_channels")
    if not (isinstance(scales, list) and scales):
        raise _unusable(file, "block_out_channels")
    return int(2 ** (len(scales) - 1))


def _unusable(file: Path, name: str) -> LoraqError:
    return LoraqError(
        f"'{file}' has no usable '{name}', so it is not the file of this pipeline's "
        f"{file.parent.name}. Restore it."
    )


def check_call(
    function: Callable[..., Any], call: Mapping[str, Any], reserved: Mapping[str, str], key: str
) -> None:
    """LoraqError for an argument in `call` that `function` does not have, or that is reserved.

    reserved: argument → what to do instead. key: where `call` was given, for the error.
    """
    known = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        and name not in ("self", *reserved)
    ]
    for name, value in call.items():
        if name in reserved:
            raise LoraqError(f"{key}.{name}={value!r}: {reserved[name]}. Leave it out of {key}.")
        if known and name not in known:
            owner = function.__qualname__.partition(".")[0]
            raise LoraqError(f"{key}: {unknown(f'argument of {owner}', name, known)}")


def meta_transformer(model: ModelConfig, buffers: bool = False, blocks: int | None = None) -> Any:
    """The transformer on the meta device, without weights, to list and count its layers.

    buffers: allocate the buffers, such as position tables, which no file contains. blocks: instead
    of the model's own number.
    """
    from accelerate import init_empty_weights

    table = find_family(model.family)
    config = resolve_folder(model) / "transformer" / "config.json"
    values = read_json(config)
    if packed := values.get("quantization_config"):
        raise LoraqError(
            f"'{config.parent}' is quantised already ({packed.get('quant_method')}). Set "
            "model.path to the 16-bit model, or evaluate this one with: loraq score FOLDER."
        )
    if blocks is not None:
        values["num_layers"] = blocks
    diffusers = quiet_diffusers()
    with init_empty_weights(include_buffers=not buffers):
        return getattr(diffusers, table.TRANSFORMER).from_config(values)
