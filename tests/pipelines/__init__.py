"""Little pipelines of the real classes with random weights, one file a family.

Each file has `pipeline()`, `STEPS` and `CALL`, further arguments of the pipeline's call with which
it runs in a second.
"""

from __future__ import annotations

import importlib
import pkgutil
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def names() -> list[str]:
    """The families that have a little pipeline."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def settings(name: str) -> ModuleType:
    """The file of a family: `CALL` and `STEPS`."""
    return importlib.import_module(f"{__name__}.{name}")


def build(name: str) -> DiffusionPipeline:
    """The pipeline of a family, in evaluation mode as a loaded one."""
    pipe = settings(name).pipeline()
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.eval()
    return pipe


@cache
def little_folder(name: str) -> Path:
    """The folder of a saved pipeline; saved once per process, do not change it."""
    folder = Path(_root().name) / name
    build(name).save_pretrained(folder, safe_serialization=True)
    return folder


@cache
def _root() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="loraq-pipelines-")  # removed when the process ends
