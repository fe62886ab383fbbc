"""Little pipelines of the real classes with random weights, one file a family.

Each file has `pipeline()`, `STEPS` and `CALL`, further arguments of the pipeline's call with which
it runs in a second. Files that start with an underscore hold shared parts.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def names() -> list[str]:
    """The families that have a little pipeline."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in found if not name.startswith("_"))


def settings(name: str) -> ModuleType:
    """The file of a family: `CALL` and `STEPS`."""
    return importlib.import_module(f"{__name__}.{name}")


def build(name: str) -> DiffusionPipeline:
    """The pipeline of a family, in evaluation mode as a loaded one, always of the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(13)
        pipe = settings(name).pipeline()
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, name: str, prompts: list[str]) -> torch.Tensor:
    """The outputs for the prompts, one seed each: images or frames in [0, 1], or waveforms."""
    file = settings(name)
    output = pipe(
        prompt=list(prompts),
        num_inference_steps=file.STEPS,
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(prompts))],
        output_type="pt",
        **file.CALL,
    )
    return torch.as_tensor(output[0])


def overrides(name: str) -> list[str]:
    """Settings of `loraq run` for the saved little pipeline of a family."""
    file = settings(name)
    fields = {"guidance_scale": "guidance", **{key: key for key in ("height", "width")}}
    fields["max_sequence_length"] = "max_sequence_length"
    given = {"path": little_folder(name), "dtype": "float32", "steps": file.STEPS}
    given |= {field: file.CALL[key] for key, field in fields.items() if key in file.CALL}
    call = {key: value for key, value in file.CALL.items() if key not in fields}
    return [
        "model=hub",
        *(f"model.{field}={value}" for field, value in given.items()),
        *(f"+model.call.{key}={json.dumps(value)}" for key, value in call.items()),
    ]


@cache
def little_folder(name: str) -> Path:
    """The folder of a saved pipeline; saved once per process, do not change it."""
    folder = Path(_root().name) / name
    build(name).save_pretrained(folder, safe_serialization=True)
    return folder


@cache
def _root() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="loraq-pipelines-")  # removed when the process ends
