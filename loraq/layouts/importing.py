"""Read checkpoints that other programs run, and compute here what their engines would.

    network = load_network("FOLDER/transformer")       layers are `EngineLinear`s, on any device
    pipe = SomePipeline.from_pretrained("FOLDER", transformer=network)

A file without a configuration goes into a 16-bit network: `put_into(network, load_contents(file))`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loraq.errors import LoraqError, did_you_mean, near_matches
from loraq.layouts.engine_linear import EngineLinear
from loraq.layouts.files import metadata_object, read_config, weight_files
from loraq.layouts.fitting import fitted
from loraq.layouts.targets import Contents, Target, targets
from loraq.models.networks import network_class, without_weights


def find_layout(path: Path) -> Target | None:
    """The layout of a folder or a file, from names and metadata; None for any other file."""
    found = [target for target in targets().values() if target.detect(path)]
    if len(found) > 1:
        raise LoraqError(
            f"'{path}' has the marks of {' and '.join(t.name for t in found)}. Its metadata or "
            "config.json must name one of them."
        )
    return found[0] if found else None


def load_contents(path: str | Path) -> Contents:
    """The layers and other tensors of a folder or a safetensors file, whatever its layout.

    Raises LoraqError for a file of no known layout, and for a tensor that its layout does not have.
    """
    path = Path(path)
    if not weight_files(path) or (target := find_layout(path)) is None:
        raise LoraqError(
            f"'{path}' has none of the layouts that are read here ({', '.join(targets())}). Load a "
            "packed checkpoint of LoRaQ, or one of another quantiser, with from_pretrained of "
            "diffusers."
        )
    return target.read(path)


def load_network(path: str | Path, dtype: torch.dtype | None = None) -> nn.Module:
    """The network of a folder or a file with its quantised layers emulated, on the CPU.

    dtype: of what is not quantised; None: as stored. Raises LoraqError without a configuration.
    """
    path = Path(path)
    contents, config = load_contents(path), _config(path)
    name = str(config.get("_class_name"))
    network = without_weights(network_class("diffusers", name, config), config, buffers=True)
    put_into(network, contents)
    if dtype is not None:
        _cast(network, dtype)
    return network.eval().requires_grad_(False)


def put_into(network: nn.Module, contents: Contents) -> None:
    """Replace layers of `network` by emulated ones and load its other tensors, in place.

    Raises LoraqError, before anything is changed, if names or shapes do not fit.
    """
    modules, contents = dict(network.named_modules()), fitted(contents, network)
    for name, layer in contents.layers.items():
        module = modules.get(name)
        found = getattr(module, "weight", None)
        if not isinstance(module, nn.Linear | nn.Conv2d) or not isinstance(found, torch.Tensor):
            raise _unfit(network, name, "layer", modules)
        shape = tuple(layer.weight.shape)
        if tuple(found.shape) != shape + (1, 1) * isinstance(module, nn.Conv2d):
            raise LoraqError(
                f"'{name}' is {shape} in the file and {tuple(found.shape)} in this "
                f"{type(network).__name__}. Use the model that it was made from."
            )
    state = network.state_dict()
    replaced = tuple(f"{name}." for name in contents.layers)
    expected = {name: t for name, t in state.items() if not name.startswith(replaced)}
    plain = {f"{name}.bias" for name, layer in contents.layers.items() if layer.bias_O is None}
    if missing := sorted((expected.keys() - contents.others.keys()) | (plain & state.keys())):
        raise LoraqError(
            f"The file has no tensor '{missing[0]}' ({len(missing)} are missing) of this "
            f"{type(network).__name__}. Restore the file, or use the model that it was made from."
        )
    for name, tensor in contents.others.items():
        if name not in expected:
            raise _unfit(network, name, "tensor", expected)
        if tensor.shape != expected[name].shape:
            raise LoraqError(
                f"'{name}' is {tuple(tensor.shape)} in the file and {tuple(expected[name].shape)} "
                f"in this {type(network).__name__}. Use the model that it was made from."
            )
    for name, layer in contents.layers.items():
        module = EngineLinear(layer, isinstance(modules[name], nn.Conv2d))
        network.set_submodule(name, module.to(_device(modules[name])), strict=True)
    network.load_state_dict(contents.others, strict=False, assign=_on_meta(expected.values()))


def _cast(network: nn.Module, dtype: torch.dtype) -> None:
    """Give parameters the types that from_pretrained of diffusers does: some stay in float32.

    Emulated layers have none. Buffers that no file holds, such as position tables, are in float32.
    """
    kept = set(getattr(network, "_keep_in_fp32_modules", None) or ())
    for name, parameter in network.named_parameters():
        own = torch.float32 if kept & set(name.split(".")) else dtype
        parameter.data = parameter.data.to(own)


def _unfit(network: nn.Module, name: str, what: str, known: Iterable[str]) -> LoraqError:
    guess = did_you_mean(near_matches(name, known))
    return LoraqError(
        f"The file has a {what} '{name}', which this {type(network).__name__} does not have."
        f"{guess} Use the model that it was made from."
    )


def _config(path: Path) -> Mapping[str, Any]:
    """The network's configuration: `config.json`, or that in the metadata of a file."""
    if found := read_config(path):
        return found
    found = metadata_object(path, "config")
    if "_class_name" not in found:
        raise LoraqError(
            f"'{path}' has no config.json, and its metadata no configuration of diffusers. Load "
            "the 16-bit network, and use put_into(network, load_contents(file))."
        )
    return found


def _device(module: nn.Module) -> torch.device:
    """Where the new layer goes: an empty network takes the file's tensors as they are."""
    device = module.get_parameter("weight").device
    return torch.device("cpu") if device.type == "meta" else device


def _on_meta(tensors: Iterable[torch.Tensor]) -> bool:
    return any(tensor.is_meta for tensor in tensors)
