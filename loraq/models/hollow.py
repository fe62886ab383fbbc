"""Networks of a pipeline that are not run: they have their configuration, and no tensors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraq.config import ModelConfig
from loraq.models.component_names import denoiser_names, is_decoder
from loraq.models.files import components, read_json
from loraq.models.networks import network_class, without_weights
from loraq.models.source import config_folder

if TYPE_CHECKING:
    import torch


def hollow_parts(model: ModelConfig, device: str) -> dict[str, Any]:
    """Denoisers and decoders of the pipeline for a call that ends before they run, by name."""
    import torch

    folder = config_folder(model)
    listed = components(folder)
    names = (*denoiser_names(listed), *filter(is_decoder, listed))
    place, dtype = torch.device(device), getattr(torch, model.dtype)
    return {name: _hollow(folder / name, *listed[name], place, dtype) for name in names}


def _hollow(part: Path, library: str, name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A network of diffusers from its `config.json`, without any tensor.

    A pipeline reads its settings and, as of a loaded one, its device and dtype.
    """
    values = read_json(part / "config.json")
    kind: Any = network_class(library, name, values)
    own = {"device": property(lambda _: device), "dtype": property(lambda _: dtype)}
    made = without_weights(type(kind.__name__, (kind,), own), values)
    for module in made.modules():
        module._parameters.clear()
        module._buffers.clear()
    return made.eval()
