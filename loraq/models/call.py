"""The arguments of a pipeline's call: which ones a run may set, and their values for the text."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from loraq.config import ModelConfig
from loraq.errors import LoraqError, unknown
from loraq.models.family import find_family

SETTINGS = {
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "height": "height",
    "width": "width",
    "max_sequence_length": "max_sequence_length",
}
"""Arguments of the pipeline's `__call__` → the settings of a model that hold them."""
RESERVED = {
    "prompt": "prompts are set with data=…",
    **{argument: f"set model.{name}" for argument, name in SETTINGS.items()},
    "generator": "every image has its own seed (generate.seed)",
    "output_type": "images are saved as PNG",
}
"""Arguments of the pipeline's `__call__` that a run sets, with the setting to use instead."""
FRAMES = ("num_frames", "frames", "video_length")
"""Arguments of the pipeline's `__call__` that count the frames of a video."""
CLEANERS = {"bs4": "beautifulsoup4", "ftfy": "ftfy"}
"""Modules with which diffusers cleans captions → the packages that hold them."""


def sampling_arguments(pipeline: Any, model: ModelConfig) -> dict[str, Any]:
    """The arguments of the pipeline's call for steps, guidance and size, those that it has."""
    known = inspect.signature(pipeline.__call__).parameters
    given = {argument: getattr(model, name) for argument, name in SETTINGS.items()}
    return {name: value for name, value in given.items() if name in known and value is not None}


def check_model_call(pipeline: Any, model: ModelConfig) -> None:
    """LoraqError for a setting or an argument in `model.call` that the pipeline does not have.

    pipeline: its class. Also for an argument that has no effect or is set by the run.
    """
    known = inspect.signature(pipeline.__call__).parameters
    if "prompt" not in known:
        raise LoraqError(
            f"A {pipeline.__name__} takes no prompt, and LoRaQ generates from prompts. Use a model "
            "that draws from a text, or quantise it in Python: loraq.quantize(pipe)."
        )
    for argument, name in SETTINGS.items():
        if argument not in known and getattr(model, name) is not None:
            raise LoraqError(
                f"model.{name}={getattr(model, name)}: the call of {pipeline.__name__} has no "
                f"{argument}. Set model.{name}=null."
            )
    if not model.call:
        return
    check_call(pipeline.__call__, model.call, RESERVED, "model.call")
    own_guidance = "guidance_scale" in known and "true_cfg_scale" not in known
    given = model.guidance if own_guidance else None
    if model.call.get("negative_prompt") and given is not None and not model.guided:
        raise LoraqError(
            f"model.call.negative_prompt has no effect with model.guidance={given:g}; "
            "it needs a guidance above 1. Raise it, or leave the negative prompt out."
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


def check_text(pipeline: Any, model: ModelConfig) -> None:
    """LoraqError if captions are to be cleaned and a package for it is not installed.

    diffusers then logs a message and leaves them as they are.
    """
    if not encodes_apart(pipeline):
        return
    if not text_arguments(pipeline, model).get("clean_caption"):
        return
    missing = [name for module, name in CLEANERS.items() if not importlib.util.find_spec(module)]
    if missing:
        plus = "" if "clean_caption" in model.call else "+"
        raise LoraqError(
            f"model.call.clean_caption=true (the pipeline's default) needs packages that are not "
            f"installed: pip install {' '.join(missing)}. To use captions as they are written, set "
            f"{plus}model.call.clean_caption=false."
        )


def embedding_names(pipeline: Any, model: ModelConfig) -> tuple[str, ...]:
    """What `encode_prompt` returns and `__call__` takes, in order; () if the text is recorded.

    pipeline: a pipeline or its class. A family may have transformers of other pipelines as well.
    """
    family = find_family(model.family)
    name = (pipeline if isinstance(pipeline, type) else type(pipeline)).__name__
    return family.EMBEDDINGS if name in family.PIPELINES else ()


def encodes_apart(pipeline: Any) -> bool:
    """Whether the pipeline's text can be encoded before its images: by `encode_prompt`."""
    return hasattr(pipeline, "encode_prompt")


def binning(pipeline: Any, model: ModelConfig) -> bool:
    """Whether the pipeline makes images of a size from its own table, and resizes them."""
    known = inspect.signature(pipeline.__call__).parameters
    name = "use_resolution_binning"
    return bool(model.call.get(name, name in known and known[name].default))


def frames_argument(pipeline: Any) -> str | None:
    """The argument of the pipeline's call that counts frames; None if it makes no video."""
    known = inspect.signature(pipeline.__call__).parameters
    return next((name for name in FRAMES if name in known), None)


def frames_of(pipeline: Any, model: ModelConfig) -> int:
    """The frames of a video, by `model.call` or by default; 1 for an image."""
    if (name := frames_argument(pipeline)) is None:
        return 1
    usual = inspect.signature(pipeline.__call__).parameters[name].default
    count = model.call.get(name, usual)
    return count if isinstance(count, int) else 1


def encoded_settings(pipeline: Any, model: ModelConfig) -> dict[str, Any]:
    """Steps, height and width, as far as the pipeline's `encode_prompt` takes them."""
    if not encodes_apart(pipeline):
        return {}
    found = {"num_inference_steps": model.steps, "height": model.height, "width": model.width}
    encoding = inspect.signature(pipeline.encode_prompt).parameters
    return {name: value for name, value in found.items() if name in encoding}


def text_arguments(pipeline: Any, model: ModelConfig) -> dict[str, Any]:
    """The arguments with which the pipeline's call would encode prompts.

    pipeline: a pipeline or its class. These are the defaults of `__call__`, not those of
    `encode_prompt` (SANA's human instruction, PixArt's cleaning of captions), overridden by
    `model.call`.
    """
    encoding = inspect.signature(pipeline.encode_prompt).parameters
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(pipeline.__call__).parameters.items()
        if name in encoding and name != "prompt"
    }
    own = {name: value for name, value in model.call.items() if name in encoding}
    return {**defaults, **own, "max_sequence_length": model.max_sequence_length}
