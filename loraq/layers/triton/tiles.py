"""Tile sizes by product, chosen by counting instructions (experiments/bench/kernel_counts.py).

A thread of `int` keeps two numbers per output, the int32 sum of a step and the fp32 sum of all, so
that only 64 × 128 outputs fit four warps; the others keep one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from loraq.layers.triton.operands import ProductMode


class Tile(NamedTuple):
    """Tokens, outputs, warps and steps that are loaded ahead."""

    tokens: int
    outputs: int
    warps: int
    stages: int


def choose_tile(modes: set[ProductMode], large: bool) -> Tile:
    """The tile of a kernel with products of these modes.

    large: the GPU's shared memory holds three steps of 128 × 256 16-bit operands
    (`has_large_memory`), and the kernel keeps one sum per output.
    """
    if "int" in modes:
        return Tile(64, 128, 4, 3)
    if modes == {"values"} and large:
        return Tile(128, 256, 8, 3)
    return Tile(128, 128, 8, 3 if large else 2)


def has_large_memory(device: torch.device) -> bool:
    """Whether a block of threads has 144 KiB of shared memory: data-centre GPUs from sm90 on."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] in (9, 10)
