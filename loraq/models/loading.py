"""Load a diffusers pipeline, or its transformer without weights. No remote code, no pickles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loraq.config import ModelConfig
from loraq.errors import LoraqError
from loraq.models.call import check_model_call, check_text
from loraq.models.contents import check_contents
from loraq.models.files import components, read_json
from loraq.models.finite import check_pipeline
from loraq.models.layers import find_family
from loraq.models.networks import quiet_diffusers
from loraq.models.source import resolve_folder
from loraq.utils.texts import first_line


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
    pipeline = getattr(quiet_diffusers(), table.PIPELINES[0])
    check_model_call(model)
    if "text_encoder" not in without:
        check_text(model)
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
        reason = first_line(error)
        raise LoraqError(
            f"'{folder}' does not load as {table.PIPELINES[0]}: {reason[:300]}\n"
            "  Restore the folder, or set model.path to a complete one."
        ) from error
    pipe.set_progress_bar_config(disable=True)
    if pipe.vae is not None:
        pipe.vae.enable_slicing()  # one image at a time: independent of its batch
    pipe.to(device)
    check_pipeline(pipe)
    return pipe


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


def meta_transformer(model: ModelConfig, buffers: bool = False) -> Any:
    """The transformer on the meta device, without weights, to list and count its layers.

    buffers: allocate the buffers, such as position tables, which no file contains. LoraqError if
    the model is quantised already.
    """
    config = resolve_folder(model) / "transformer" / "config.json"
    if packed := read_json(config).get("quantization_config"):
        raise LoraqError(
            f"'{config.parent}' is quantised already ({packed.get('quant_method')}). Set "
            "model.path to the 16-bit model, or evaluate this one with: loraq score FOLDER."
        )
    return architecture(model, buffers)


def architecture(model: ModelConfig, buffers: bool = False, blocks: int | None = None) -> Any:
    """The transformer's class on the meta device, with 16-bit layers whatever its files hold.

    buffers: as in `meta_transformer`. blocks: instead of the model's own number.
    """
    from accelerate import init_empty_weights

    values = read_json(resolve_folder(model) / "transformer" / "config.json")
    values.pop("quantization_config", None)
    if blocks is not None:
        values["num_layers"] = blocks
    table, diffusers = find_family(model.family), quiet_diffusers()
    with init_empty_weights(include_buffers=not buffers):
        return getattr(diffusers, table.TRANSFORMERS[0]).from_config(values)
