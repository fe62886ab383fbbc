"""Block Hadamard rotation with signs: x → x·D·H, W → W·D·H with (D·H)(D·H)ᵀ = 1.

Shapes: x_TI tokens × in, w_OI out × in; D is diagonal ±1, H is block-diagonal with normalised
Sylvester–Hadamard blocks, so x·Wᵀ is unchanged (QuaRot, arXiv 2404.00456, applied per block).

A regular Hadamard matrix has equal sums in all rows, so that no channel collects the block's mean
(ConvRot). With the signs (1, 1, 1, −1) ⊗ (1, 1, 1, −1) ⊗ …, D·H is one up to the order and signs of
its columns.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from loraq.errors import LoraqError
from loraq.utils.constants import unless_traced


def largest_block(width: int, limit: int, regular: bool = False) -> int:
    """Largest power of two, or of four if `regular`, that divides `width` and is at most `limit`.

    Raises LoraqError for an odd width: a block of one value has no rotation.
    """
    if limit < 2 or limit & (limit - 1):
        raise LoraqError(
            f"quant.transform.hadamard={limit}: the block must be a power of two ≥ 2, or 0 for no "
            "rotation. Set 64, for example."
        )
    block = math.gcd(width, limit)
    if block < 2:
        raise LoraqError(
            f"A block Hadamard rotation needs an even width, and a layer has {width} input "
            "channels. Set quant.transform.hadamard=0, or add the layer to quant.skip."
        )
    if regular and not is_power_of_four(block):
        block //= 2
    if regular and block < 4:
        raise LoraqError(
            f"quant.transform.signs=regular needs blocks of 4, 16, 64 … channels, and a layer has "
            f"{width} input channels with hadamard={limit}. Set signs=random, or add the layer to "
            "quant.skip."
        )
    return block


def random_signs(width: int, generator: torch.Generator) -> Tensor:
    """D's diagonal: ±1 with equal probability, (I,) int8."""
    return torch.randint(0, 2, (width,), generator=generator, dtype=torch.int8) * 2 - 1


def is_power_of_four(block: int) -> bool:
    """Whether regular matrices of this size exist here: 4, 16, 64, 256 …"""
    return block >= 4 and block & (block - 1) == 0 and block.bit_length() % 2 == 1


def regular_signs(width: int, block: int) -> Tensor:
    """D's diagonal for which D·H is a regular matrix up to columns: (I,) int8; block: 4, 16, …"""
    four = signs = torch.tensor([1, 1, 1, -1], dtype=torch.int8, device="cpu")
    while len(signs) < block:
        signs = torch.kron(signs, four)
    return signs.repeat(width // block)


@functools.cache
def regular_matrix(block: int) -> Tensor:
    """The symmetric regular matrix of 4, 16, 64 … channels, normalised, float32 on the CPU."""
    four = matrix = (torch.ones(4, 4, device="cpu") - 2 * torch.eye(4, device="cpu").flip(0)) / 2
    while len(matrix) < block:
        matrix = torch.kron(matrix, four)
    return matrix


def regular_order(signs_I: Tensor, block: int) -> tuple[Tensor, Tensor] | None:
    """Where the channels of x·(regular matrix) are in x·D·H, and which are negated; both (I,).

    None if the two rotations differ by more than the order and the signs of channels.
    """
    if not is_power_of_four(block):
        return None
    signs_NB = signs_I.cpu().float().view(-1, block)
    found = hadamard_matrix(block) * signs_NB[:, None] @ regular_matrix(block)  # (N, B, B)
    if not torch.allclose(found.abs().amax(1), torch.ones(()), atol=1e-3):
        return None
    places_NB = found.abs().argmax(1)
    flips_NB = found.gather(1, places_NB[:, None])[:, 0] < 0
    places_NB += block * torch.arange(len(found))[:, None]
    return places_NB.flatten().to(signs_I.device), flips_NB.flatten().to(signs_I.device)


def hadamard_matrix(block: int) -> Tensor:
    """Sylvester's H_{2n} = [[H, H], [H, −H]] / √2, (block, block) float32, symmetric, H·H = 1."""
    h = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    while h.shape[0] < block:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return (h / math.sqrt(block)).float()


@functools.lru_cache(maxsize=32)
def _cached_matrix(block: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`hadamard_matrix` on a device, cached because every layer needs it in every step."""
    with torch.inference_mode(False):  # the cached tensor may later be used with autograd
        return hadamard_matrix(block).to(device=device, dtype=dtype)


@torch.compiler.assume_constant_result
def matrix(block: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The kept `hadamard_matrix` on a device; a constant under torch.compile."""
    return unless_traced(_cached_matrix)(block, device, dtype)


def rotate(x: Tensor, signs_I: Tensor, block: int) -> Tensor:
    """x·D·H over the last axis, for any leading axes; keeps the dtype."""
    return rotate_by(x, signs_I, matrix(block, x.device, x.dtype))


def rotate_by(x: Tensor, signs_I: Tensor, h: Tensor) -> Tensor:
    """`rotate` with a given block of H, in x's type."""
    return ((x * signs_I.to(x)).unflatten(-1, (-1, len(h))) @ h).flatten(-2)


def rotate_back(x: Tensor, signs_I: Tensor, block: int) -> Tensor:
    """x·H·D, the inverse of `rotate`."""
    h = matrix(block, x.device, x.dtype)
    return (x.unflatten(-1, (-1, block)) @ h).flatten(-2) * signs_I.to(x)
