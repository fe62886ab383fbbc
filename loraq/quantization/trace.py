"""Check that what is counted is what computes: one traced forward of a quantised transformer."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from loraq.errors import LoraqError
from loraq.layers.linear import QuantizedLinear
from loraq.models.denoisers import parts
from loraq.models.discovery.structure import starred_name
from loraq.models.example_inputs import example_inputs


@torch.no_grad()
def check_called(transformer: nn.Module, replaced: Mapping[str, nn.Module]) -> None:
    """Raise LoraqError unless a forward calls every packed layer and reads no replaced weight.

    replaced: name → the 16-bit layer that a packed one took the place of. Packed layers return
    zeros during the trace, so it costs only the layers that stay in 16 bits, on two text tokens.
    Each of several experts is traced.
    """
    packed = {n: m for n, m in transformer.named_modules() if isinstance(m, QuantizedLinear)}
    weights = {
        id(tensor): name for name, layer in replaced.items() for tensor in layer.parameters()
    }
    called: set[str] = set()
    reads = _Reads(weights)
    with _zero_outputs(packed, called.add), reads:
        for network in parts(transformer).values():
            network(**example_inputs(network))
    if reads.names:
        raise LoraqError(
            f"The 16-bit weight of '{reads.names[0]}' still computes after the layer was replaced: "
            "another module holds it. Load the model as its repository provides it, and quantise "
            "that."
        )
    kinds = {starred_name(name) for name in called}  # an expert is called for some values only
    idle = [name for name in packed if starred_name(name) not in kinds]
    if idle:
        raise LoraqError(
            f"{len(idle)} of {len(packed)} packed layers, such as '{idle[0]}', are not used when "
            "the transformer runs: other modules (fused projections, an attention processor) "
            "compute in their place. Undo these before quantising, or skip the layers (quant.skip)."
        )


@contextlib.contextmanager
def _zero_outputs(
    packed: Mapping[str, QuantizedLinear], note: Callable[[str], None]
) -> Iterator[None]:
    """Let every packed layer note its name and return zeros while the block runs."""

    def forward(name: str, layer: QuantizedLinear, x: Tensor) -> Tensor:
        note(name)
        if layer.convolution:
            return x.new_zeros(x.shape[0], layer.out_features, *x.shape[2:])
        return x.new_zeros(*x.shape[:-1], layer.out_features)

    for name, layer in packed.items():
        layer.__dict__["forward"] = functools.partial(forward, name, layer)
    try:
        yield
    finally:
        for layer in packed.values():
            del layer.__dict__["forward"]


class _Reads(TorchFunctionMode):
    """Notes the tensors of `watched` (id → name) that any torch function receives."""

    def __init__(self, watched: Mapping[int, str]) -> None:
        super().__init__()
        self.watched = watched
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") != "__get__":  # an attribute, such as a dtype, is no use
            used = (self.watched.get(id(leaf)) for leaf in tree_leaves((args, kwargs)))
            self.names += [name for name in used if name is not None]
        return func(*args, **(kwargs or {}))
