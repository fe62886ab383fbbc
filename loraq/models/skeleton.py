"""A pipeline without weights: what its constructor computes from the configurations of its parts.

Scale factors of its autoencoder, default sizes and sizes of patches are values of the instance, not
of its class. Text encoders are absent; denoisers and autoencoders are on the meta device.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraq.errors import LoraqError
from loraq.models.component_names import denoiser_names, is_text
from loraq.models.files import components, has_weights, read_json
from loraq.models.networks import network_class, pipeline_class, without_weights
from loraq.utils.texts import first_line

SPATIAL = (
    "vae_scale_factor_spatial",
    "vae_spatial_scale_factor",
    "vae_spatial_compression_ratio",
    "vae_scale_factor",
)
TEMPORAL = (
    "vae_scale_factor_temporal",
    "vae_temporal_scale_factor",
    "vae_temporal_compression_ratio",
)


def skeleton(folder: Path) -> Any | None:
    """The pipeline in `folder` without weights; None if its class cannot be made so."""
    configs = [folder / name / "config.json" for name in components(folder)]
    texts = [path.read_text() for path in configs if path.is_file()]
    return _skeleton(folder, (folder / "model_index.json").read_text(), tuple(texts))


@functools.lru_cache(maxsize=4)
def _skeleton(folder: Path, *_texts: Any) -> Any | None:
    kind, index = pipeline_class(folder), read_json(folder / "model_index.json")
    listed: dict[str, Any] = {}
    for name, (library, class_name) in components(folder).items():
        listed[name] = None
        if has_weights(class_name) and not is_text(name):
            values = read_json(folder / name / "config.json")
            network = network_class(library, class_name, values)
            if hasattr(network, "from_config"):
                listed[name] = _on_meta(network, values, folder / name / "config.json")
    parameters = dict(inspect.signature(kind.__init__).parameters)
    del parameters["self"]
    plain = {n: v for n, v in index.items() if n in parameters and not isinstance(v, list)}
    needed = {n: None for n, p in parameters.items() if p.default is p.empty}
    try:
        return kind(**{**needed, **{n: v for n, v in listed.items() if n in parameters}, **plain})
    except Exception:  # whatever a constructor does without tokenizers or text encoders
        return None


def _on_meta(network: Any, values: dict[str, Any], path: Path) -> Any:
    """A network of diffusers on the meta device; LoraqError if `values` are not of its class."""
    try:
        return without_weights(network, values)
    except Exception as error:  # whatever the class does with settings that are not its own
        raise LoraqError(
            f"'{path}' does not describe a {network.__name__} ({first_line(error)[:200]}). Restore "
            "the file, or set model.path to a complete copy of the model."
        ) from error


def pixels_of_latent(pipe: Any) -> int | None:
    """Pixels of an image's side per latent; None if the pipeline has no such factor."""
    return _first(vars(pipe), SPATIAL)


def size_step(pipe: Any) -> int:
    """The number of which height and width are multiples: pixels of a latent, of a patch."""
    scale, steps = pixels_of_latent(pipe), [1]
    if scale is None:
        return 1
    for name in denoiser_names(pipe.components):
        network = getattr(pipe, name)
        patch = None if network is None else getattr(network.config, "patch_size", None)
        sides = [patch] if isinstance(patch, int) else list(patch or [1])[-2:]
        steps += [scale * side for side in sides]
    for name in ("image_processor", "video_processor"):  # which pack latents into patches
        if (processor := getattr(pipe, name, None)) is not None:
            steps.append(int(processor.config.get("vae_scale_factor", 1)))
    return math.lcm(*steps)


def frame_step(pipe: Any) -> int | None:
    """Frames of a video per latent frame; None for other pipelines."""
    return _first(vars(pipe), TEMPORAL)


def default_size(pipe: Any, name: str) -> int | None:
    """The height or width (`name`) that the pipeline makes without that argument; None: unknown."""
    if (own := getattr(pipe, f"default_{name}", None)) is not None:
        return int(own)
    scale, latent = pixels_of_latent(pipe), getattr(pipe, "default_sample_size", None)
    for network in (getattr(pipe, part) for part in denoiser_names(pipe.components)):
        if network is not None and latent is None:
            config: Mapping[str, Any] = network.config
            latent = config.get(f"sample_{name}", config.get("sample_size"))
    if isinstance(latent, int) and scale is not None:
        return latent * scale
    written = re.search(rf"\b{name} = {name} or (\d+)", inspect.getsource(type(pipe).__call__))
    return int(written[1]) if written else None


def _first(held: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    found = (held[name] for name in names if isinstance(held.get(name), int))
    return next(found, None)
