"""What one of ComfyUI's formats of a linear layer must say of itself, and checks that all share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraq.errors import LoraqError
from loraq.layouts.engine_layer import SCALE_NAMES, EngineLayer
from loraq.layouts.files import Spec, check_tensors
from loraq.layouts.targets import Source

HALVES = tuple(SCALE_NAMES)
Held = Mapping[str, Tensor]
Settings = Mapping[str, Any]
Stored = tuple[dict[str, Tensor | None], dict[str, Any]]


@dataclass(frozen=True)
class Kind:
    """One format, by its `name` in `comfy_quant`.

    multiple: of both axes of the weight. refuse: as a target's, of what is the format's own.
    tensors: suffix → tensor or None, and the settings in `comfy_quant`. read: the inverse.
    """

    name: str
    description: str
    hardware: str
    multiple: int
    refuse: Callable[[Source, str], str | None]
    losses: Callable[[Source], list[str]]
    engine: Callable[[Source, str], EngineLayer]
    tensors: Callable[[EngineLayer], Stored]
    read: Callable[[str, Held, Settings], EngineLayer]


def matrix(name: str, held: Held) -> tuple[int, int]:
    """The shape of the stored weight."""
    weight = held.get("weight")
    if weight is None or weight.dim() != 2:
        raise LoraqError(f"'{name}' has no matrix weight beside comfy_quant. Restore the file.")
    return weight.shape[0], weight.shape[1]


def check(name: str, held: Held, expected: Spec, optional: Sequence[str] = ()) -> torch.dtype:
    """Check the tensors of a layer, and return its 16-bit type: that of its bias, else bfloat16."""
    bias: Spec = {"bias": ((matrix(name, held)[0],), HALVES)}
    check_tensors(name, held, {**expected, **bias}, optional=[*optional, "bias"])
    return held["bias"].dtype if "bias" in held else torch.bfloat16


def check_settings(name: str, settings: Settings, known: Sequence[str] = ()) -> None:
    """LoraqError for a setting of `comfy_quant` that would change what is computed."""
    if unread := sorted(set(settings) - set(known)):
        raise LoraqError(
            f"'{name}' has {unread[0]}={settings[unread[0]]} in comfy_quant, which is not read."
        )
