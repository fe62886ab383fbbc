"""A transformer with memory-mapped weights, to quantise with little memory."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator
from typing import Any

from loraq.config import ModelConfig
from loraq.errors import LoraqError
from loraq.models.contents import check_contents
from loraq.models.files import file_problem, weight_files
from loraq.models.finite import require_finite
from loraq.models.layers import list_layers
from loraq.models.loading import meta_transformer
from loraq.models.source import resolve_folder


def mapped_transformer(model: ModelConfig) -> Any:
    """The 16-bit transformer with its block weights mapped from their files.

    The OS loads pages of a layer's weight on first access, in the stored dtype. If that is wider
    than the config's dtype, `weight_matrix` converts to the values of the pipeline. All other
    tensors (timestep embedding, biases, tables) are read in the config's dtype. Its forward pass is
    that of the pipeline only if `runs_as_stored`.
    """
    import torch

    check_contents(model, ("transformer",))
    transformer = meta_transformer(model, buffers=True)
    names, dtype = _mapped_names(transformer, model), getattr(torch, model.dtype)
    kept = {}
    for name, tensor in _stored_tensors(model):
        kept[name] = tensor if name in names else tensor.to(dtype, copy=True)
    # weights are checked when they are quantised
    require_finite({f"transformer.{name}": kept[name] for name in kept if name not in names})
    transformer.load_state_dict(kept, strict=False, assign=True)  # they were compared above
    for name in names:
        module = transformer.get_submodule(name.rpartition(".")[0])
        if torch.promote_types(module.weight.dtype, dtype) != dtype:
            module.held_as = dtype
    return transformer.eval().requires_grad_(False)


def runs_as_stored(model: ModelConfig) -> bool:
    """Whether the files contain an unquantised transformer in the config's dtype.

    False for damaged files; loading them raises the error.
    """
    import torch
    from safetensors import SafetensorError

    folder, dtype = resolve_folder(model) / "transformer", getattr(torch, model.dtype)
    try:
        if "quantization_config" in json.loads((folder / "config.json").read_text()):
            return False
        return all(tensor.dtype == dtype for _, tensor in _stored_tensors(model))
    except (LoraqError, SafetensorError, OSError, ValueError):
        return False


def remap(transformer: Any, model: ModelConfig) -> None:
    """Map the weights of a `mapped_transformer` again, which unmaps the pages read so far."""
    import torch

    for name, tensor in _stored_tensors(model, _mapped_names(transformer, model)):
        owner, _, attribute = name.rpartition(".")
        fresh = torch.nn.Parameter(tensor, requires_grad=False)
        setattr(transformer.get_submodule(owner), attribute, fresh)


def _mapped_names(transformer: Any, model: ModelConfig) -> set[str]:
    return {f"{layer.name}.weight" for layer in list_layers(transformer, model.family, ())}


def _stored_tensors(
    model: ModelConfig, names: Container[str] | None = None
) -> Iterator[tuple[str, Any]]:
    """The memory-mapped tensors of the model's transformer, from one file or its shards."""
    from safetensors import safe_open

    folder = resolve_folder(model) / "transformer"
    for path in weight_files(folder, "diffusers", model.variant):
        if problem := file_problem(path):
            raise LoraqError(f"'{path}' {problem}. Restore the model's folder.")
        with safe_open(path, framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118 (not a mapping)
                if names is None or name in names:
                    yield name, stream.get_tensor(name)
