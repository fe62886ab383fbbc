"""Adapters (LoRA) of peft that are loaded into a network: find them, take them off, put them back.

peft puts a tuner layer around each adapted layer, which is then its `base_layer`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from loraq.errors import LoraqError

if TYPE_CHECKING:
    from torch import nn

UNLOAD = "pipe.unload_lora_weights(), or unload() of a PeftModel"
FUSE_BEFORE = (
    "fuse it before quantising: load the 16-bit pipeline and the adapter, then "
    "loraq.quantize(pipe, …, adapters='fuse')."
)


def adapted_layers(network: nn.Module) -> dict[str, Any]:
    """The tuner layers of a network by name."""
    return {name: module for name, module in network.named_modules() if is_adapted(module)}


def is_adapted(module: nn.Module) -> bool:
    """Whether a module holds an adapter: a tuner layer, or LoRA's matrices in any other module."""
    return hasattr(module, "base_layer") or getattr(module, "lora_A", None) is not None


def base_layer(network: nn.Module, name: str) -> Any:
    """The layer `name`, without the adapter around it."""
    module: Any = network.get_submodule(name)
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def refuse_adapters(network: nn.Module, why: str) -> None:
    """LoraqError if an adapter is loaded; `why` states what cannot be done with it."""
    if layers := adapted_layers(network):
        raise would_lose(next(iter(layers)), why)


def would_lose(layer: str, why: str) -> LoraqError:
    """The error for an adapter of `layer` that would be lost, for the reason `why`."""
    return LoraqError(
        f"'{layer}' has an adapter (LoRA), {why}. Remove it first ({UNLOAD}); it can be loaded "
        "again afterwards."
    )


def adapter_bytes(network: nn.Module) -> dict[str, int]:
    """Bytes of the matrices of each loaded adapter, by its name."""
    found: dict[str, int] = {}
    for adapter, parameter in adapter_parameters(network):
        found[adapter] = found.get(adapter, 0) + parameter.nbytes
    return found


def adapter_parameters(network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of all loaded adapters of peft, LoRA or another kind, each with its name."""
    for tuner in adapted_layers(network).values():
        for part in getattr(tuner, "adapter_layer_names", ()):
            for adapter, held in getattr(tuner, part).items():
                own = held.parameters() if hasattr(held, "parameters") else [held]
                yield from ((adapter, parameter) for parameter in own)


def take_off(network: nn.Module) -> dict[str, Any]:
    """Put the base layers in place of the tuner layers, which are returned by name."""
    tuners = adapted_layers(network)
    for name, tuner in tuners.items():
        network.set_submodule(name, tuner.base_layer, strict=True)
    return tuners


def put_back(network: nn.Module, tuners: Mapping[str, Any]) -> None:
    """Put each tuner layer around the layer that now has its name."""
    for name, tuner in tuners.items():
        tuner.base_layer = network.get_submodule(name)
        network.set_submodule(name, tuner, strict=True)


def refuse_fusing(*_: Any, **__: Any) -> NoReturn:
    """In place of peft's and diffusers' ways to merge an adapter into the weights."""
    raise LoraqError(
        "An adapter cannot be fused into packed weights without rounding them again. Leave it "
        f"loaded, which computes the same, or {FUSE_BEFORE}"
    )
