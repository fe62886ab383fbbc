"""nunchaku's W4A16 layers: modulation with 4-bit weights, of which only the weights are rounded.

    qweight (N/4, K/2) int32, wscales and wzeros (K/64, N), bias (N)      W = code·scale + zero

Rows are stored by channel, with the fields of a channel (shift, scale, gate, …) next to each other,
and the biases of scales hold the 1 that diffusers adds to them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from loraq.layouts.files import check_tensors

GROUP = 64
LARGEST = 7
_SHIFTS = torch.arange(0, 16, 4, dtype=torch.int32)[:, None]


def pack_modulation(
    weight_OI: Tensor, bias_O: Tensor, fields: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of a layer, rounded to codes −7..7 with the largest magnitude as scale · 7."""
    out, width = weight_OI.shape
    by_channel = weight_OI.float().view(fields, -1, width).transpose(0, 1).reshape(out, -1, GROUP)
    largest = by_channel.abs().amax(-1, keepdim=True)
    scale = torch.where(largest == 0, 1.0, largest / LARGEST).to(dtype)
    codes = (by_channel / scale.float()).round().clamp(-LARGEST, LARGEST) + LARGEST
    bias_CF = bias_O.float().view(fields, -1).T + _ones(fields, bias_O.device)
    scale_GO = scale[..., 0].T
    return {
        "qweight": pack_codes(codes.view(out, width).to(torch.uint8)),
        "wscales": scale_GO,
        "wzeros": -LARGEST * scale_GO,
        "bias": bias_CF.flatten().to(dtype),
    }


def unpack_modulation(name: str, held: Mapping[str, Tensor], fields: int = 1) -> dict[str, Tensor]:
    """weight and bias of diffusers' layer `name`; LoraqError names a tensor that is wrong.

    fields: of a channel; 1 where rows and biases are in diffusers' own order.
    """
    out, width = 4 * held["qweight"].shape[0], 2 * held["qweight"].shape[1]
    dtype = held["wscales"].dtype if "wscales" in held else torch.bfloat16
    groups = (width // GROUP, out)
    expected = {
        "qweight": ((out // 4, width // 2), torch.int32),
        "wscales": (groups, (torch.float16, torch.bfloat16)),
        "wzeros": (groups, dtype),
        "bias": ((out,), dtype),
    }
    check_tensors(name, held, expected, optional=["bias"])
    codes = unpack_codes(held["qweight"]).view(out, -1, GROUP)
    scale, zero = (held[key].float().T[..., None] for key in ("wscales", "wzeros"))
    weight = (codes * scale + zero).view(-1, fields, width).transpose(0, 1).reshape(out, width)
    found = {f"{name}.weight": weight.to(dtype)}
    if "bias" in held:
        bias = (held["bias"].float().view(-1, fields) - _ones(fields, codes.device)).T
        found[f"{name}.bias"] = bias.flatten().to(dtype)
    return found


def pack_codes(codes: Tensor) -> Tensor:
    """uint8 codes (N, K) → int32 words (N/4, K/2)."""
    out, width = codes.shape
    blocks = codes.int().view(out, width // 32, 4, 8) << _SHIFTS.to(codes.device)
    words = blocks.sum(2, dtype=torch.int32).to(torch.int16)
    tiles = words.view(out // 4, 4, width // 64, 16).transpose(1, 2)
    return tiles.reshape(out // 4, width).view(torch.int32)


def unpack_codes(words: Tensor) -> Tensor:
    """The inverse of `pack_codes`."""
    out, width = 4 * words.shape[0], 2 * words.shape[1]
    tiles = words.contiguous().view(torch.int16).view(out // 4, width // 64, 4, 16).transpose(1, 2)
    blocks = tiles.reshape(out, width // 32, 1, 8).int() >> _SHIFTS.to(words.device)
    return (blocks & 15).view(out, width).to(torch.uint8)


def _ones(fields: int, device: torch.device) -> Tensor:
    """1 for the scale of each half: (shift, scale, gate) once or twice."""
    found = torch.zeros(fields, device=device)
    found[1::3] = 1.0
    return found
