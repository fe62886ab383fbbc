"""The text of prompts that are encoded already, in one of two forms.

A family whose `encode_prompt` returns what `__call__` takes lists the names (`EMBEDDINGS`): its
text is a mapping of these arguments. That of every other pipeline is a `Recording`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from torch import Tensor

from loraq.runner.recording import Recording

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Text = Mapping[str, Tensor] | Recording


def text_part(text: Text, start: int, count: int) -> Text:
    """The text of `count` prompts from `start` on."""
    if isinstance(text, Recording):
        return text.part(start, count)
    return {name: rows[start : start + count] for name, rows in text.items()}


def answered(pipe: DiffusionPipeline, text: Text | None) -> AbstractContextManager[None]:
    """Context in which the pipeline's next call finds its prompts encoded by a recording."""
    return text.answering(pipe) if isinstance(text, Recording) else contextlib.nullcontext()
