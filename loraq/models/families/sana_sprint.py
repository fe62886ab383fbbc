"""SANA-Sprint: SANA's transformer with an embedded guidance, so without negative prompts.

Its pipeline returns other embeddings than SANA's; they are recorded as for any pipeline.
"""

from __future__ import annotations

from loraq.models.families.sana import (
    DEFAULT_SKIP,
    OUTPUT,
    SIZE_MULTIPLE,
    TRANSFORMERS,
    known_inputs,
)

__all__ = [
    "DEFAULT_SKIP",
    "OUTPUT",
    "PIPELINES",
    "SIZE_MULTIPLE",
    "TRANSFORMERS",
    "known_inputs",
]

PIPELINES = ("SanaSprintPipeline",)
