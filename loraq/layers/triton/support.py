"""Which equations the kernels compute: told by formats and sizes, before anything is packed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from loraq.formats import Format
from loraq.layers.tensors import LayerTensors
from loraq.layers.triton.operands import INTERPRETED, Unsupported, product_of

MOST_RANKS = 256
LONGEST_TOKEN = 1 << 13


@dataclass(frozen=True)
class Equation:
    """One layer's formats and sizes; no branch where the rank is 0."""

    weight: Format
    activation: Format
    width: int
    rank: int = 0
    branch_weight: Format | None = None
    branch_activation: Format | None = None
    requantize_intermediate: bool = True

    @classmethod
    def of(cls, tensors: LayerTensors) -> Equation:
        fmt, width = tensors.weight.format, tensors.weight.shape[-1]
        if tensors.left is None or tensors.right is None or tensors.branch_activation is None:
            return cls(fmt, tensors.activation, width)
        return cls(
            fmt,
            tensors.activation,
            width,
            tensors.right.shape[0],
            tensors.right.format,
            tensors.branch_activation,
            tensors.requantize_intermediate,
        )


def equations(
    formats: Mapping[str, Format], requantize: bool, rank: int, widths: Iterable[int]
) -> list[Equation]:
    """Those of a recipe's layers, from its four formats by name."""
    branch = (formats["branch_weight"], formats["branch_activation"], requantize)
    main = formats["weight"], formats["activation"]
    return [
        Equation(*main, width, rank, *branch) if rank else Equation(*main, width)
        for width in sorted(set(widths))
    ]


def check(equation: Equation, device: torch.device) -> None:
    """Unsupported where a kernel is missing on this device; it says what to set instead."""
    if device.type != "cuda" and not INTERPRETED:
        raise Unsupported(
            f"compute=triton runs on a GPU, and the layer's input is on '{device}'. Move the model "
            "(pipe.to('cuda')), or set compute=emulate."
        )
    _check_activation(equation.activation, equation.width)
    _check_weight(equation.weight)
    product_of(equation.activation, equation.weight, device)
    stored, fmt = equation.branch_weight, equation.branch_activation
    if stored is None or fmt is None:
        return
    _check_activation(fmt, equation.width)
    _check_weight(stored)
    if fmt.tensor_scale == "token":
        raise Unsupported(
            f"No kernel quantises a branch's input as '{fmt.label}' (a scale a token above the "
            "blocks'). Set compute=emulate, or tensor_scale=fixed for the branch."
        )
    if equation.rank > MOST_RANKS:
        raise Unsupported(
            f"No kernel takes a branch of rank {equation.rank}; the largest is {MOST_RANKS}. "
            "Set compute=emulate."
        )
    if not equation.requantize_intermediate and stored.family != "float":
        raise Unsupported(
            "No kernel keeps x·Rᵀ in float beside an L of few bits. Set compute=emulate."
        )
    product_of(fmt, stored, device)
    product_of(fmt if equation.requantize_intermediate else stored, stored, device)


def _check_weight(fmt: Format) -> None:
    if fmt.tensor_scale == "token":
        raise Unsupported(
            f"No kernel reads weights as '{fmt.label}' (a scale a row above the blocks'). "
            "Set compute=emulate."
        )


def _check_activation(fmt: Format, width: int) -> None:
    block = fmt.block
    if not fmt.per_token:
        raise Unsupported(
            f"No kernel quantises activations as '{fmt.label}' (one scale for all). "
            "Set compute=emulate."
        )
    if fmt.clip != "none":
        raise Unsupported(f"No kernel searches scales ('{fmt.label}'). Set compute=emulate.")
    if block is None and fmt.family != "float" and width > LONGEST_TOKEN:
        raise Unsupported(f"No kernel finds one scale for {width} channels. Set compute=emulate.")
    if block is not None and block & (block - 1):
        raise Unsupported(
            f"No kernel cuts '{fmt.label}': its block is no power of two. Set compute=emulate."
        )
