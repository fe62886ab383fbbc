"""Which equations have kernels, determined from formats and sizes before anything is packed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from loraq.formats import Format
from loraq.layers.tensors import LayerTensors
from loraq.layers.triton.operands import INTERPRETED, Unsupported, choose_product

MAX_RANK = 256
MAX_TOKEN_WIDTH = 1 << 13  # channels with one scale per token


@dataclass(frozen=True)
class Equation:
    """One layer's formats and sizes; rank 0: no branch."""

    weight: Format
    activation: Format
    width: int
    rank: int = 0
    branch_weight: Format | None = None
    branch_activation: Format | None = None
    requantize_intermediate: bool = True

    @classmethod
    def from_layer(cls, tensors: LayerTensors) -> Equation:
        """The equation of a packed layer."""
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


def recipe_equations(
    formats: Mapping[str, Format], requantize: bool, rank: int, widths: Iterable[int]
) -> list[Equation]:
    """The equations of a recipe's layers, from its four formats by name and the input widths."""
    weight, activation = formats["weight"], formats["activation"]
    if not rank:
        return [Equation(weight, activation, width) for width in sorted(set(widths))]
    branch_weight, branch_activation = formats["branch_weight"], formats["branch_activation"]
    return [
        Equation(weight, activation, width, rank, branch_weight, branch_activation, requantize)
        for width in sorted(set(widths))
    ]


def check_supported(equation: Equation, device: torch.device) -> None:
    """Raise Unsupported if the equation has no kernel on this device."""
    if device.type != "cuda" and not INTERPRETED:
        raise Unsupported(
            f"compute=triton needs a GPU, and the layer's input is on '{device}'. Move the model "
            "(pipe.to('cuda')), or set compute=emulate."
        )
    _check_activation(equation.activation, equation.width)
    _check_weight(equation.weight)
    choose_product(equation.activation, equation.weight, device)
    stored, fmt = equation.branch_weight, equation.branch_activation
    if stored is None or fmt is None:
        return
    _check_activation(fmt, equation.width)
    _check_weight(stored)
    if fmt.tensor_scale == "token":
        raise Unsupported(
            f"No kernel quantises a branch's input to '{fmt.label}' (tensor_scale=token). "
            "Set compute=emulate, or quant.branch_activation.tensor_scale=fixed."
        )
    if equation.rank > MAX_RANK:
        raise Unsupported(
            f"No kernel supports a branch of rank {equation.rank}; the limit is {MAX_RANK}. "
            "Set compute=emulate."
        )
    if not equation.requantize_intermediate and stored.family != "float":
        raise Unsupported(
            "No kernel keeps x·Rᵀ in float with a quantised L. Set compute=emulate, or "
            "quant.requantize_intermediate=true."
        )
    choose_product(fmt, stored, device)
    choose_product(fmt if equation.requantize_intermediate else stored, stored, device)


def _check_weight(fmt: Format) -> None:
    if fmt.tensor_scale == "token":
        raise Unsupported(
            f"No kernel reads weights in '{fmt.label}' (tensor_scale=token). Set compute=emulate."
        )


def _check_activation(fmt: Format, width: int) -> None:
    block = fmt.block
    if not fmt.per_token:
        raise Unsupported(
            f"No kernel quantises activations to '{fmt.label}' (one scale per tensor). "
            "Set compute=emulate."
        )
    if fmt.clip != "none":
        raise Unsupported(f"No kernel supports clip=mse ('{fmt.label}'). Set compute=emulate.")
    if block is None and fmt.family != "float" and width > MAX_TOKEN_WIDTH:
        raise Unsupported(
            f"No kernel supports one scale per token of {width} channels; the limit is "
            f"{MAX_TOKEN_WIDTH}. Set compute=emulate."
        )
    if block is not None and block & (block - 1):
        raise Unsupported(
            f"No kernel supports '{fmt.label}': its block is not a power of two. Set "
            "compute=emulate."
        )
