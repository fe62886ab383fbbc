"""One forward of a network without weights: what its layers read, and which of them it calls."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from loraq.models.discovery.arguments import InputShape, arguments, layouts, side_of
from loraq.models.discovery.skeleton import build_skeleton
from loraq.models.family import Family

SMALLEST = InputShape()
_UNCHANGED = {
    "dropout", "reshape", "view", "flatten", "unflatten", "contiguous", "to", "type", "float",
    "transpose", "permute", "movedim", "squeeze", "unsqueeze",
}  # fmt: skip
"""Operations whose output has the values of their first argument."""


@dataclass(frozen=True)
class Call:
    """One call of a layer: the tensor that it read, its multiply-adds, whether it read a GELU.

    tensor: its id, and its version, which an operation in place changes.
    """

    tensor: tuple[int, int]
    products: int
    after_gelu: bool


@dataclass
class Trace:
    """The calls of every layer, in order. `failure`: why there are none.

    layout, side: of the latents (`arguments.py`). attention: channels, queries and keys of each
    product of queries with keys and with values.
    """

    calls: dict[str, list[Call]] = field(default_factory=dict)
    layout: str = "image"
    side: int = 0
    attention: list[tuple[int, int, int]] = field(default_factory=list)
    failure: str = ""

    def input_of(self, name: str) -> tuple[tuple[int, int], ...] | None:
        """What the layer reads, equal for layers that read the same; None if it is not called."""
        calls = self.calls.get(name)
        return None if calls is None else tuple(call.tensor for call in calls)


def trace(
    kind: Any,
    config: dict[str, Any],
    family: Family,
    shape: InputShape = SMALLEST,
    only: Sequence[str] = (),
) -> tuple[nn.Module, Trace]:
    """The class `kind` with `config` without weights, and one forward of it (or why it fails).

    only: the layouts of the latents to try (none: those that are plausible), unless the family
    gives the arguments.
    """
    watched, furthest = _Watched(), Trace()
    network = build_skeleton(kind, _with_short_table(config, shape.side), watched.note)
    given = family.example_inputs
    sizes = {"side": shape.side, "tokens": shape.tokens} if shape.side else {}
    for layout in only or (layouts(network) if given is None else [""]):
        watched.trace = Trace(layout=layout)
        try:
            with (
                torch.no_grad(),
                torch.compiler.set_stance("force_eager"),
                warnings.catch_warnings(action="ignore"),  # of values that nobody uses
                watched,
            ):
                watched.trace.side = side_of(network, shape, layout)
                if given is None:
                    network(**arguments(network, shape, layout))
                else:
                    network(**given(network, **sizes))
            return network, watched.trace
        except Exception as error:  # whatever a class does with inputs that are not its own
            if not furthest.failure or len(watched.trace.calls) > len(furthest.calls):
                furthest = replace(watched.trace, failure=_first_line(error))
    return network, Trace(failure=furthest.failure, layout=furthest.layout)


def _with_short_table(config: dict[str, Any], side: int | None) -> dict[str, Any]:
    """Positions for latents of this side alone: the whole table of SD3.5 has 2 GB in float64."""
    if not (config.get("pos_embed_max_size") and (patch := config.get("patch_size"))):
        return config
    return {**config, "pos_embed_max_size": -(-(side or 4) // patch)}


def _first_line(error: Exception) -> str:
    text = str(error).strip() or "no message"
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}"


class _Watched(TorchFunctionMode):
    """Notes what the layers read, follows outputs of GELU, and skips products of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.trace = Trace()
        self.gelus: set[int] = set()
        self.alive: list[Tensor] = []  # so that no two tensors have one id

    def note(self, name: str, module: Any, x: Tensor) -> None:
        self.alive.append(x)
        products = x.numel() * module.weight.numel()
        if isinstance(module, nn.Linear):
            products //= module.in_features
        else:  # a convolution
            products //= module.in_channels * math.prod(module.stride)
        call = Call((id(x), x._version), products, id(x) in self.gelus)
        self.trace.calls.setdefault(name, []).append(call)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            q, k, v = (*args, *(kwargs[n] for n in ("query", "key", "value") if n in kwargs))[:3]
            channels = q.shape[:-2].numel() * (q.shape[-1] + v.shape[-1])
            self.trace.attention.append((channels, q.shape[-2], k.shape[-2]))
            return q.new_zeros(*q.shape[:-1], v.shape[-1])
        found = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        follows = name == "gelu" or (name in _UNCHANGED and args and id(args[0]) in self.gelus)
        if follows:
            self.alive += [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
            self.gelus |= {id(leaf) for leaf in tree_leaves(found)}
        elif args and found is args[0]:  # in place
            self.gelus.discard(id(found))
        return found
