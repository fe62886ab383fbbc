"""What a model's configuration leaves open, from the model's files and its pipeline's signature.

    family, name    `auto`: by the class in `model_index.json`; the name of the folder or repository
    steps, …        None: the default of the pipeline's call, if its call has such an argument
    height, width   without a default there, those that the pipeline computes from its networks

Configurations and signatures are read, no weights. Keys and records hold what is found here.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraq.config import ModelConfig
from loraq.errors import LoraqError
from loraq.models.call import SETTINGS
from loraq.models.component_names import require_denoiser
from loraq.models.family import family_for
from loraq.models.networks import pipeline_class
from loraq.models.skeleton import default_size, skeleton
from loraq.models.source import config_folder

AUTO = "auto"


def with_defaults(model: ModelConfig) -> ModelConfig:
    """The configuration with everything filled that its pipeline defines; of a hub model, fetched.

    LoraqError for a setting that the model does not define and the pipeline needs.
    """
    open_settings = [name for name in SETTINGS.values() if getattr(model, name) is None]
    if not open_settings and AUTO not in (model.family, model.name):
        return model
    try:
        folder = config_folder(model)
    except LoraqError:
        if model.hub_id is None or model.steps is None or AUTO in (model.family, model.name):
            raise
        return model  # what stays None has the pipeline's default; the plan says what is missing
    pipeline = pipeline_class(folder)
    require_denoiser(pipeline)
    found: dict[str, Any] = {}
    if model.family == AUTO:
        found["family"] = family_for(pipeline.__name__)
    if model.name == AUTO:
        found["name"] = str(model.hub_id or model.path).rstrip("/").rpartition("/")[2]
    parameters = inspect.signature(pipeline.__call__).parameters
    for argument, name in SETTINGS.items():
        if name in open_settings and argument in parameters:
            found[name] = parameters[argument].default
    if found.get("steps", model.steps) is None:
        raise LoraqError(
            f"model.steps=null: {pipeline.__name__} has no default for it. Set model.steps."
        )
    for name in ("height", "width"):
        if name in found and found[name] is None:
            found[name] = _side(folder, name)
    return replace(model, **found)


def _side(folder: Path, name: str) -> int:
    """The height or width in pixels that the pipeline makes by default."""
    pipe = skeleton(folder)
    side = None if pipe is None else default_size(pipe, name)
    if side is None:
        raise LoraqError(
            f"model.{name}=null: the files in '{folder}' do not tell the size of the images. Set "
            f"model.{name}, in pixels."
        )
    return side
