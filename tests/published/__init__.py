"""Published configurations of pipelines without weights, one folder a model.

A folder is in `save_pretrained` layout without weights and tokenizers. Its `source.json` says where
the configurations and the published number of parameters come from.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The models whose configurations are here."""
    return sorted(path.parent.name for path in FOLDER.glob("*/model_index.json"))


def source(name: str) -> dict[str, Any]:
    """hub_id, denoiser_parameters (all denoisers together), and where they are from."""
    return json.loads((FOLDER / name / "source.json").read_text())


@cache
def denoisers(name: str) -> dict[str, Any]:
    """The denoisers of a model by component, on the meta device."""
    import diffusers
    import torch
    from diffusers.models.modeling_utils import no_init_weights

    built = {}
    for part in ("transformer", "transformer_2"):
        path = FOLDER / name / part / "config.json"
        if path.exists():
            config = json.loads(path.read_text())
            with no_init_weights(), torch.device("meta"):
                built[part] = getattr(diffusers, config["_class_name"]).from_config(config)
    return built
