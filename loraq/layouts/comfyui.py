"""ComfyUI's files of quantised linear layers without a branch; one file may mix formats.

Each quantised layer has `comfy_quant`, uint8, the bytes of a JSON object with its `format` and
settings, beside the tensors of the format (`comfyui_*.py`; comfy-kitchen 0.2.40).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraq.errors import LoraqError, unknown
from loraq.layouts import comfyui_convrot, comfyui_mxfp8, comfyui_nvfp4
from loraq.layouts.comfyui_kind import Kind
from loraq.layouts.files import (
    WEIGHTS,
    by_layer,
    read_names,
    read_tensors,
    write_config,
    write_layers,
)
from loraq.layouts.losses import sixteen_bits
from loraq.layouts.refusals import refuse_convolution
from loraq.layouts.targets import Contents, Source, Target

MARKER = "comfy_quant"
KINDS = {m.KIND.name: m.KIND for m in (comfyui_convrot, comfyui_mxfp8, comfyui_nvfp4)}


def target(kind: Kind) -> Target:
    """The target that writes one format; it reads all of them, since files mix formats."""

    def refuse(source: Source, name: str) -> str | None:
        layer = source.layers[name]
        if layer.left is not None:
            return "it has a branch, and ComfyUI has none. Use method=rtn, gptq or smoothquant"
        if reason := kind.refuse(source, name) or refuse_convolution(source, name):
            return reason
        if any(size % kind.multiple for size in layer.weight.shape):
            return (
                f"it is {' × '.join(map(str, layer.weight.shape))}, and both must be multiples of "
                f"{kind.multiple}. Add it to quant.skip"
            )
        return None

    def losses(source: Source) -> list[str]:
        names = "Layers have their names in diffusers; ComfyUI's own models name some differently."
        return [*kind.losses(source), sixteen_bits(source), names]

    def write(source: Source, folder: Path) -> None:
        layers: dict[str, dict[str, Tensor | None]] = {}
        for name in source.layers:
            layer = kind.engine(source, name)
            held, settings = kind.tensors(layer)
            said = json.dumps({"format": kind.name, **settings}).encode()
            held |= {"bias": layer.bias_O, MARKER: torch.tensor(list(said), dtype=torch.uint8)}
            layers[name] = held
        write_layers(folder / WEIGHTS, layers, source.other_tensors())
        write_config(folder, source.network, None)

    def detect(path: Path) -> bool:
        names = sorted(name for name in read_names(path) if name.endswith(f".{MARKER}"))
        if not names:
            return False
        return _settings(names[0], read_tensors(path, names[:1])[names[0]])["format"] == kind.name

    return Target(
        name=f"comfyui-{kind.name}",
        description=kind.description,
        readers="ComfyUI",
        hardware=kind.hardware,
        refuse=refuse,
        losses=losses,
        write=write,
        detect=detect,
        read=read,
    )


def read(path: Path) -> Contents:
    """Layers of any of the formats."""
    groups, others = by_layer(read_tensors(path), MARKER)
    layers = {}
    for name, held in groups.items():
        settings = _settings(name, held.pop(MARKER))
        kind = KINDS[settings.pop("format")]
        layers[name] = kind.read(name, held, settings)
    return Contents(layers, others)


def _settings(name: str, stored: Tensor) -> dict[str, Any]:
    """The JSON object of a layer, whose format is one of ours."""
    try:
        found = dict(json.loads(bytes(stored.tolist())))
    except (TypeError, ValueError) as error:
        raise LoraqError(f"'{name}' holds no JSON object ({error}). Restore the file.") from error
    if found.get("format") not in KINDS:
        raise unknown(f"format of '{name}'", str(found.get("format")), KINDS)
    return found


CONVROT, MXFP8, NVFP4 = map(target, KINDS.values())
