"""Memory of what a loaded denoiser holds, whichever library quantised it.

Every stored tensor counts once, also those inside a tensor of a class of its own (torchao, quanto)
and those that a library keeps beside a weight (bitsandbytes). A tensor that the 16-bit network has
too, with its name and shape and in 16 bits or more, is not quantised, nor is an adapter (LoRA). All
others are, and stand for the weights that are left.
"""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from loraq.errors import LoraqError
from loraq.models.adapters import adapter_parameters
from loraq.models.denoisers import parts
from loraq.models.finite import stored_tensors, without_values
from loraq.models.networks import without_weights

_NOT_ENTERED = (nn.Module, type, types.ModuleType, types.FunctionType, types.MethodType)


@dataclass(frozen=True)
class Held:
    """Bytes in the memory of a denoiser, and the weights of its 16-bit network.

    kinds: kind of storage → bytes, such as `{"int8": …, "uint8 (WeightQBitsTensor)": …}`.
    """

    nbytes: int
    weights: int
    quantized_nbytes: int
    quantized_weights: int
    kinds: Mapping[str, int]

    @property
    def bits_per_weight(self) -> float:
        """Of the whole denoiser, with its buffers."""
        return 8 * self.nbytes / self.weights

    @property
    def quantized_bits_per_weight(self) -> float | None:
        """Of the quantised layers, without biases; None if there are none."""
        count = self.quantized_weights
        return 8 * self.quantized_nbytes / count if count else None

    def plain(self) -> dict[str, Any]:
        """The values for a JSON file."""
        return {
            "nbytes": self.nbytes,
            "weights": self.weights,
            "bits_per_weight": self.bits_per_weight,
            "quantized_nbytes": self.quantized_nbytes,
            "quantized_weights": self.quantized_weights,
            "quantized_bits_per_weight": self.quantized_bits_per_weight,
            "kinds": dict(self.kinds),
        }


def held_memory(denoiser: nn.Module) -> Held:
    """What the networks of a denoiser hold; before a forward, whose products may be kept too.

    LoraqError for tensors that are offloaded, and for a network that is no model of diffusers.
    """
    seen: set[Any] = set()
    kinds: Counter[str] = Counter()
    total = weights = rest = plain = 0
    for held in parts(denoiser).values():
        network = getattr(held, "_orig_mod", held)  # torch.compile wraps it
        if not hasattr(type(network), "from_config"):
            raise LoraqError(
                f"A {type(network).__name__} is no model of diffusers, so that its 16-bit weights "
                "are not known. Put the model inside into the pipeline, as of a PeftModel its "
                "get_base_model()."
            )
        adapters = {id(parameter) for _, parameter in adapter_parameters(network)}
        whole = without_weights(type(network), getattr(network, "config", {}))
        # parameters, whose number is the weights', and buffers such as position tables
        expected = dict(whole.named_parameters())
        weights += sum(tensor.numel() for tensor in expected.values())
        shapes = {name: x.shape for name, x in [*expected.items(), *whole.named_buffers()]}
        for name, tensor in _named_tensors(network):
            size, owner = 0, type(tensor)
            of_class = "" if owner in (Tensor, nn.Parameter) else f" ({owner.__name__})"
            for part in _with_notes(tensor, set()):
                if part.is_meta:
                    raise without_values(name)
                place = (part.device, part.data_ptr(), part.nbytes)
                if place not in seen:
                    seen.add(place)
                    size += part.nbytes
                    kinds[str(part.dtype).removeprefix("torch.") + of_class] += part.nbytes
            total += size
            if id(tensor) in adapters:
                rest += size
            elif _is_plain(tensor) and shapes.get(name) == tensor.shape:
                rest += size
                plain += tensor.numel() if name in expected else 0
    return Held(total, weights, total - rest, weights - plain, dict(sorted(kinds.items())))


def _named_tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers; those of tied layers once under each name.

    They have the names that they have in 16 bits: a bias of an emulated layer shows its shape
    (`bias_O`), and an adapter is around its layer.
    """
    for name, tensor in network.named_parameters(remove_duplicate=False):
        yield name.replace(".base_layer.", "."), tensor
    for name, tensor in network.named_buffers(remove_duplicate=False):
        name = name.replace(".base_layer.", ".")
        yield name.removesuffix("_O") if name.endswith(".bias_O") else name, tensor


def _is_plain(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.is_floating_point()
    return plain and tensor.element_size() > 1


def _with_notes(value: Any, entered: set[int]) -> Iterator[Tensor]:
    """The plain tensors of a value, and of the objects and tensors in its attributes.

    bitsandbytes keeps scales in `weight.quant_state`, and scales of these scales inside it.
    """
    if id(value) in entered or isinstance(value, _NOT_ENTERED):
        return
    entered.add(id(value))
    if isinstance(value, Tensor):
        yield from (tensor for _, tensor in stored_tensors("", value))
        if type(value) is Tensor:
            return
    for inner in getattr(value, "__dict__", {}).values():
        yield from _with_notes(inner, entered)
