"""Denoisers with memory-mapped weights, to quantise with little memory."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator
from typing import TYPE_CHECKING, Any

from loraq.config import ModelConfig
from loraq.errors import LoraqError
from loraq.models.contents import check_contents
from loraq.models.denoisers import TRANSFORMER, joined, of_part, parts
from loraq.models.files import components, file_problem, weight_files
from loraq.models.finite import require_finite
from loraq.models.layers import list_layers
from loraq.models.loading import denoisers_in, meta_denoiser
from loraq.models.networks import network_class
from loraq.models.source import resolve_folder

if TYPE_CHECKING:
    import torch
    from torch import nn


def mapped_transformer(model: ModelConfig) -> nn.Module:
    """The 16-bit denoiser with its block weights mapped from their files.

    The OS loads pages of a layer's weight on first access, in the stored dtype. If that is wider
    than the config's dtype, `weight_matrix` converts to the values of the pipeline. All other
    tensors (timestep embedding, biases, tables) are read in the config's dtype. Its forward pass is
    that of the pipeline only if `runs_as_stored`.
    """
    import torch

    check_contents(model, denoisers_in(model))
    denoiser = meta_denoiser(model, buffers=True)
    names, dtype = _mapped_names(denoiser, model), getattr(torch, model.dtype)
    for part, network in parts(denoiser).items():
        kept = {}
        for name, tensor in _stored_tensors(model, part):
            if joined(part, name) in names:
                kept[name] = tensor
            else:
                kept[name] = tensor.to(_dtype_of(network, name, dtype), copy=True)
        # weights are checked when they are quantised
        others = [name for name in kept if joined(part, name) not in names]
        require_finite({f"{part or TRANSFORMER}.{name}": kept[name] for name in others})
        network.load_state_dict(kept, strict=False, assign=True)  # they were compared above
    for name in names:
        module: Any = denoiser.get_submodule(name.rpartition(".")[0])
        if torch.promote_types(module.weight.dtype, dtype) != dtype:
            module.held_as = dtype
    return denoiser.eval().requires_grad_(False)


def runs_as_stored(model: ModelConfig) -> bool:
    """Whether the files contain unquantised denoisers in the dtype in which they are loaded.

    False for damaged files; loading them raises the error.
    """
    import torch
    from safetensors import SafetensorError

    folder, dtype = resolve_folder(model), getattr(torch, model.dtype)
    try:
        for part in denoisers_in(model):
            values = json.loads((folder / part / "config.json").read_text())
            if "quantization_config" in values:
                return False
            kind = network_class(*components(folder)[part], values)
            for name, tensor in _stored_tensors(model, part):
                if tensor.dtype != dtype and not _is_wide(kind, name):
                    return False
        return True
    except (LoraqError, SafetensorError, OSError, ValueError):
        return False


def remap(denoiser: nn.Module, model: ModelConfig) -> None:
    """Map the weights of a `mapped_transformer` again, which unmaps the pages read so far."""
    import torch

    names = _mapped_names(denoiser, model)
    for part, network in parts(denoiser).items():
        for name, tensor in _stored_tensors(model, part, of_part(dict.fromkeys(names), part)):
            owner, _, attribute = name.rpartition(".")
            fresh = torch.nn.Parameter(tensor, requires_grad=False)
            setattr(network.get_submodule(owner), attribute, fresh)


def _mapped_names(denoiser: nn.Module, model: ModelConfig) -> set[str]:
    names = {f"{layer.name}.weight" for layer in list_layers(denoiser, model.family, ())}
    return {
        joined(part, name)
        for part, network in parts(denoiser).items()
        for name in of_part(dict.fromkeys(names), part)
        if not _is_wide(network, name)
    }


def _is_wide(network: nn.Module | type[nn.Module], name: str) -> bool:
    """Whether diffusers keeps a tensor of the network, or of its class, in float32."""
    wide = getattr(network, "_keep_in_fp32_modules", None) or ()
    return any(part in wide for part in name.split("."))


def _dtype_of(network: nn.Module, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a tensor that is loaded as `dtype`, as diffusers chooses it."""
    import torch

    return torch.float32 if _is_wide(network, name) else dtype


def _stored_tensors(
    model: ModelConfig, part: str, names: Container[str] | None = None
) -> Iterator[tuple[str, Any]]:
    """The memory-mapped tensors of a part (`parts`), from one file or its shards."""
    from safetensors import safe_open

    folder = resolve_folder(model) / (part or TRANSFORMER)
    for path in weight_files(folder, "diffusers", model.variant):
        if problem := file_problem(path):
            raise LoraqError(f"'{path}' {problem}. Restore the model's folder.")
        with safe_open(path, framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118 (not a mapping)
                if names is None or name in names:
                    yield name, stream.get_tensor(name)
