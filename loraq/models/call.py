"""The arguments of a pipeline's call: which ones a run may set, and their values for the text."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from loraq.config import ModelConfig
from loraq.errors import LoraqError, unknown
from loraq.models.layers import find_family
from loraq.models.networks import quiet_diffusers

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
CLEANERS = {"bs4": "beautifulsoup4", "ftfy": "ftfy"}
"""Modules with which diffusers cleans captions → the packages that hold them."""


def check_model_call(model: ModelConfig) -> None:
    """LoraqError for an argument in `model.call` that is unknown, unused or set by the run."""
    if not model.call:
        return
    check_call(_pipeline(model).__call__, model.call, RESERVED, "model.call")
    if model.call.get("negative_prompt") and model.guidance <= 1:
        raise LoraqError(
            f"model.call.negative_prompt has no effect with model.guidance={model.guidance:g}; "
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


def check_text(model: ModelConfig) -> None:
    """LoraqError if captions are to be cleaned and a package for it is not installed.

    diffusers then logs a message and leaves them as they are.
    """
    if not text_arguments(_pipeline(model), model).get("clean_caption"):
        return
    missing = [name for module, name in CLEANERS.items() if not importlib.util.find_spec(module)]
    if missing:
        plus = "" if "clean_caption" in model.call else "+"
        raise LoraqError(
            f"model.call.clean_caption=true (the pipeline's default) needs packages that are not "
            f"installed: pip install {' '.join(missing)}. To use captions as they are written, set "
            f"{plus}model.call.clean_caption=false."
        )


def embedding_names(model: ModelConfig) -> tuple[str, ...]:
    """What `encode_prompt` returns and `__call__` takes, in order; () if the text is recorded."""
    return find_family(model.family).EMBEDDINGS


def encoded_settings(model: ModelConfig) -> dict[str, Any]:
    """Steps, height and width, as far as the pipeline's `encode_prompt` takes them."""
    found = {"num_inference_steps": model.steps, "height": model.height, "width": model.width}
    encoding = inspect.signature(_pipeline(model).encode_prompt).parameters
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


def _pipeline(model: ModelConfig) -> Any:
    return getattr(quiet_diffusers(), find_family(model.family).PIPELINES[0])
