"""Load a diffusers pipeline, or its transformer without weights. No remote code, no pickles."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loraq.config import ModelConfig
from loraq.errors import LoraqError
from loraq.models.call import binning, check_model_call, check_text, frames_argument, frames_of
from loraq.models.component_names import denoiser_names, is_decoder, is_text
from loraq.models.contents import check_contents
from loraq.models.dtypes import cast_inputs, network_dtypes
from loraq.models.family import find_family
from loraq.models.files import components, has_weights, read_json
from loraq.models.finite import check_pipeline
from loraq.models.networks import network_class, without_weights
from loraq.models.skeleton import frame_step, pixels_of_latent, size_step, skeleton
from loraq.models.source import config_folder, pipeline_of, resolve_folder
from loraq.utils.texts import first_line

if TYPE_CHECKING:
    from torch import nn


def load_pipeline(
    model: ModelConfig, device: str = "cpu", without: Sequence[str] = (), **given: Any
) -> Any:
    """The unmodified diffusers pipeline in the config's dtype on `device`, without progress bars.

    without: components that are not loaded (None).
    given: components that are passed to `from_pretrained` instead of being loaded.
    LoraqError if a file or a tensor is missing or damaged, or if `model` does not fit the pipeline.
    """
    import torch

    folder, pipeline = resolve_folder(model), pipeline_of(model)
    own, absent = getattr(torch, model.dtype), {*without, *given}
    dtypes = {n: getattr(torch, d) for n, d in network_dtypes(model).items()}
    dtypes = {name: dtype for name, dtype in dtypes.items() if name not in absent}
    check_contents(model, components(folder).keys() - absent)
    check_model_call(pipeline, model)
    if not {*text_parts(model)} & {*without}:
        check_text(pipeline, model)
    try:
        pipe = pipeline.from_pretrained(
            str(folder),
            dtype={"default": own, **dtypes} if dtypes else own,
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
            f"'{folder}' does not load as {pipeline.__name__}: {reason[:300]}\n"
            "  Restore the folder, or set model.path to a complete one."
        ) from error
    pipe.set_progress_bar_config(disable=True)
    vae: Any = getattr(pipe, "vae", None)
    if hasattr(vae, "enable_slicing"):
        vae.enable_slicing()  # one image at a time: independent of its batch
    for name in dtypes:
        if not is_text(name):  # which reads tokens
            cast_inputs(getattr(pipe, name))
    pipe.to(device)
    check_pipeline(pipe)
    return pipe


def text_parts(model: ModelConfig) -> tuple[str, ...]:
    """The networks of the model's pipeline that read prompts."""
    listed = components(config_folder(model)).items()
    return tuple(n for n, (_, class_name) in listed if is_text(n) and has_weights(class_name))


def image_parts(model: ModelConfig) -> tuple[str, ...]:
    """The denoisers and autoencoders of the model's pipeline, without which it encodes prompts."""
    names = components(config_folder(model))
    decoders = (name for name in names if is_decoder(name))
    return (*denoiser_names(names), *decoders)


def check_size(model: ModelConfig) -> None:
    """LoraqError for a size that the pipeline, its decoder or its patches cannot make.

    With resolution binning, the pipeline itself chooses a size and resizes the images.
    """
    pipeline = pipeline_of(model)
    if model.size is None or (pipe := skeleton(config_folder(model))) is None:
        return
    step = math.lcm(size_step(pipe), find_family(model.family).SIZE_MULTIPLE)
    for name, size in zip(("height", "width"), model.size, strict=True):
        if size % step and not binning(pipeline, model):
            near = max(step, round(size / step) * step)
            raise LoraqError(
                f"model.{name}={size} is no multiple of {step}, the pixels of a patch of this "
                f"model. Set model.{name}={near}, for example."
            )
    counted, each = frames_argument(pipeline), frame_step(pipe)
    if counted is None or each is None or counted not in model.call:
        return
    frames = frames_of(pipeline, model)
    usual = inspect.signature(pipeline.__call__).parameters[counted].default
    if (frames - 1) % each and isinstance(usual, int) and not (usual - 1) % each:
        near = round((frames - 1) / each) * each + 1
        raise LoraqError(
            f"model.call.{counted}={frames}: a latent of this model is {each} frames, after the "
            f"first one alone. Set model.call.{counted}={near}, for example."
        )


def latent_sizes(model: ModelConfig) -> tuple[int, int, int] | None:
    """(frames, height, width) of the latents of an image or a video; None if nothing tells them."""
    pipe = skeleton(config_folder(model))
    scale = None if pipe is None else pixels_of_latent(pipe)
    if pipe is None or model.size is None or scale is None:
        return None
    height, width = (max(1, side // scale) for side in model.size)
    return (frames_of(pipe, model) - 1) // (frame_step(pipe) or 1) + 1, height, width


def denoisers_in(model: ModelConfig) -> tuple[str, ...]:
    """The names of the denoisers in the model's folder; LoraqError without one."""
    folder = config_folder(model)
    names = denoiser_names(components(folder))
    if not names:
        raise LoraqError(
            f"'{folder}/model_index.json' lists no transformer. LoRaQ quantises diffusion "
            "transformers: use a model whose pipeline has one, with all of its components."
        )
    return names


def meta_denoiser(model: ModelConfig, buffers: bool = False) -> nn.Module:
    """The denoiser on the meta device, without weights, to list and count its layers.

    buffers: allocate the buffers, such as position tables, which no file contains. LoraqError if
    the model is quantised already.
    """
    folder = config_folder(model)
    for name in denoisers_in(model):
        if packed := read_json(folder / name / "config.json").get("quantization_config"):
            raise LoraqError(
                f"'{folder / name}' is quantised already ({packed.get('quant_method')}). Set "
                "model.path to the 16-bit model, or evaluate this one with: loraq score FOLDER."
            )
    return architecture(model, buffers)


def architecture(model: ModelConfig, buffers: bool = False, blocks: int | None = None) -> nn.Module:
    """The denoiser's classes on the meta device, with 16-bit layers whatever their files hold.

    buffers: as in `meta_denoiser`. blocks: instead of the model's own number.
    """
    from loraq.models.denoisers import gathered

    folder = config_folder(model)
    listed, found = components(folder), {}
    for name in denoisers_in(model):
        values = read_json(folder / name / "config.json")
        if blocks is not None:
            values["num_layers"] = blocks
        found[name] = without_weights(network_class(*listed[name], values), values, buffers)
    return gathered(found, str(folder))
