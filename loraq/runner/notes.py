"""What a run does with a model that its user may not expect, in words for the plan."""

from __future__ import annotations

from collections.abc import Iterable

from loraq.config import ModelConfig
from loraq.models.call import binning, encodes_apart
from loraq.models.dtypes import network_dtypes
from loraq.models.source import pipeline_of


def model_notes(models: Iterable[ModelConfig]) -> list[str]:
    """A line for everything that is worth knowing of these models; models may repeat."""
    return list(dict.fromkeys(note for model in models for note in _notes(model)))


def _notes(model: ModelConfig) -> Iterable[str]:
    pipeline = pipeline_of(model)
    kind = pipeline.__name__
    if not encodes_apart(pipeline):
        yield (
            f"{model.name}: a {kind} has no encode_prompt, so it is called with prompts, and its "
            "text encoders stay in memory."
        )
    if wide := network_dtypes(model):
        listed = ", ".join(f"{name} in {dtype}" for name, dtype in wide.items())
        yield f"{model.name}: the denoiser runs in {model.dtype}, {listed} (model.dtypes)."
    if binning(pipeline, model) and model.size is not None:
        yield (
            f"{model.name}: {kind} makes images of the nearest size in its own table and resizes "
            f"them to {model.height}x{model.width} (model.call.use_resolution_binning)."
        )
