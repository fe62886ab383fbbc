"""What a pipeline makes: images, videos or clips of sound; read from its class.

A pipeline of diffusers returns a class of its own with the outputs in one field: `images`, `frames`
or `audios`. The code of its call names that class, so that the kind is known before any weights.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any, Final

from loraq.config import ModelConfig
from loraq.errors import LoraqError
from loraq.models.family import find_family
from loraq.models.source import pipeline_of
from loraq.utils.kinds import UNITS, Kind

FIELDS: Final[dict[Kind, str]] = {"image": "images", "video": "frames", "audio": "audios"}
"""Kind → the field of the pipeline's output that holds one entry per prompt."""
RATES = ("frame_rate", "fps")
"""Arguments of pipelines that say how many frames a second of the video has."""
FRAME_RATE = 16.0
"""Frames per second of a video whose pipeline does not say it and `model.fps` neither."""


def output_kind(model: ModelConfig) -> Kind:
    """The kind of output of a model's pipeline; its family may state it, which costs no import."""
    return find_family(model.family).OUTPUT or kind_of_class(pipeline_of(model))


@functools.cache
def kind_of_class(pipeline: type) -> Kind:
    """The kind of output of a pipeline class; images if its call names no class of outputs."""
    fields = output_fields(pipeline)
    return next((kind for kind in ("audio", "video") if FIELDS[kind] in fields), "image")


@functools.cache
def output_fields(pipeline: type) -> frozenset[str]:
    """The fields of what the pipeline's call returns, such as `frames` and `audio`."""
    from diffusers.utils import BaseOutput

    call: Any = inspect.unwrap(pipeline.__call__)
    named = (call.__globals__.get(name) for name in call.__code__.co_names)
    made = [found for found in named if isinstance(found, type) and issubclass(found, BaseOutput)]
    data = filter(dataclasses.is_dataclass, made)
    return frozenset(field.name for one in data for field in dataclasses.fields(one))


def frame_rate(model: ModelConfig) -> tuple[float, str]:
    """Frames per second of the model's videos, and what says so.

    The pipeline's own argument counts, as the call sets it or by default; then `model.fps`.
    """
    parameters = inspect.signature(pipeline_of(model).__call__).parameters
    for name in RATES:
        if name in parameters:
            given = model.call.get(name, parameters[name].default)
            return float(given), f"model.call.{name}"
    if model.fps is not None:
        return model.fps, "model.fps"
    return FRAME_RATE, ""


def check_outputs(model: ModelConfig) -> list[str]:
    """What should be known of a model's videos before they are made, in sentences.

    LoraqError if `model.fps` has no effect.
    """
    kind = output_kind(model)
    source = frame_rate(model)[1] if kind == "video" else ""
    if model.fps is not None and source != "model.fps":
        remedy = f"Set {source} instead" if source else f"The model makes {UNITS[kind]}"
        raise LoraqError(f"model.fps={model.fps:g} has no effect. {remedy}, and model.fps=null.")
    said = []
    if kind == "video" and not source:
        said.append(
            f"The pipeline of '{model.name}' does not say how fast its videos are: their files say "
            f"{FRAME_RATE:g} frames per second. Set model.fps; metrics do not depend on it."
        )
    if kind == "video" and not output_fields(pipeline_of(model)).isdisjoint({"audio", "audios"}):
        said.append(f"'{model.name}' makes videos with sound; only their frames are kept.")
    return said
