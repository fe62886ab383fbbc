"""comfy-kitchen's SVDQuant INT4 in its natural, row-major order (comfy-kitchen 0.2.40).

`weight` (O, I/2) int8 holds our codes byte for byte; everything else has one 16-bit type:
`weight_scale` (I/64, O), `weight_proj_down` (I, R), `weight_proj_up` (O, R),
`weight_smooth_factor` (I), `bias` (O). A layer behind a GELU adds 0.171875 and reads unsigned
codes, which no tensor says: the reading program sets `act_unsigned`. The layers' names are in the
file's metadata and in config.json.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from loraq.errors import LoraqError
from loraq.formats import Format, QuantizedTensor, get_format
from loraq.layouts.engine_layer import SCALE_NAMES, EngineLayer, engine_layer, of_one_rank
from loraq.layouts.files import (
    WEIGHTS,
    by_layer,
    check_tensors,
    metadata_object,
    quantization_config,
    read_names,
    read_tensors,
    write_config,
    write_layers,
)
from loraq.layouts.losses import activation_loss, svdquant_losses
from loraq.layouts.refusals import (
    refuse_convolution,
    refuse_format,
    refuse_rotation,
    refuse_shift,
    refuse_width,
)
from loraq.layouts.targets import Contents, Source, Target
from loraq.transforms import GELU_SHIFT

log = logging.getLogger(__name__)

LAYOUT = "TensorCoreSVDQuantW4A4Layout"
METADATA = "svdquant_w4a4"
GROUP = 64
RANK_STEP = 16
MARKER = "weight_proj_down"


def refuse(source: Source, name: str) -> str | None:
    """Anything but linear layers in INT4 in groups of 64 without a rotation."""
    layer = source.layers[name]
    fits = (layer.weight.format.name, layer.weight.format.block) == ("int4", GROUP)
    return (
        refuse_rotation(layer)
        or refuse_format(layer, fits, "format@quant.weight=int4")
        or refuse_convolution(source, name)
        or refuse_width(layer, GROUP)
        or (None if layer.transform.shift == GELU_SHIFT else refuse_shift(layer))
    )


def losses(source: Source) -> list[str]:
    """What the 16-bit types and the readers' arithmetic change."""
    found = activation_loss(source, lambda x: _activation(x.transform.shift != 0, source.dtype))
    if count := sum(layer.transform.shift != 0 for layer in source.layers.values()):
        found.append(
            f"{count} layers behind a GELU have unsigned activations. No tensor says which: the "
            f"reading program must set act_unsigned for the layers listed in {METADATA} of the "
            "file's metadata and in config.json, or it computes wrong outputs."
        )
    return [*svdquant_losses(source), *found]


def write(source: Source, folder: Path) -> None:
    """The network's tensors in one file, and its configuration."""
    layers = {name: _engine_layer(source, name) for name in source.layers}
    tensors = {name: _tensors(layer) for name, layer in of_one_rank(layers, RANK_STEP).items()}
    unsigned = [name for name, layer in layers.items() if layer.shift]
    settings = {"layout": LAYOUT, "act_unsigned": unsigned}
    metadata = {METADATA: json.dumps(settings)}
    write_layers(folder / WEIGHTS, tensors, source.other_tensors(), metadata)
    write_config(folder, source.network, {"quant_method": "comfy-kitchen", **settings})


def detect(path: Path) -> bool:
    """By the names of the branch's factors."""
    return any(name.endswith(f".{MARKER}") for name in read_names(path))


def read(path: Path) -> Contents:
    """Layers in their natural order; files of other programs may have ranks per layer."""
    groups, others = by_layer(read_tensors(path), MARKER)
    unsigned = _unsigned(path, groups)
    return Contents({n: _read_layer(n, held, n in unsigned) for n, held in groups.items()}, others)


def _engine_layer(source: Source, name: str) -> EngineLayer:
    layer = source.layers[name]
    return engine_layer(layer, _activation(layer.transform.shift != 0, source.dtype), source.dtype)


def _activation(unsigned: bool, dtype: torch.dtype) -> Format:
    return get_format("uint4" if unsigned else "int4", scale=SCALE_NAMES[dtype])


def _tensors(layer: EngineLayer) -> dict[str, Tensor]:
    packed = layer.weight
    assert isinstance(packed, QuantizedTensor) and packed.scale is not None
    assert layer.down_IR is not None and layer.up_OR is not None
    found = {
        "weight": packed.codes.view(torch.int8),
        "weight_scale": packed.scale.T,
        "weight_proj_down": layer.down_IR,
        "weight_proj_up": layer.up_OR,
        "weight_smooth_factor": layer.divisors_I(),
    }
    return found if layer.bias_O is None else {**found, "bias": layer.bias_O}


def _read_layer(name: str, held: Mapping[str, Tensor], unsigned: bool) -> EngineLayer:
    down_IR, codes = held[MARKER], held.get("weight")
    if down_IR.dim() != 2 or down_IR.dtype not in SCALE_NAMES or codes is None or codes.dim() != 2:
        raise LoraqError(
            f"'{name}' has {MARKER} {tuple(down_IR.shape)} of {down_IR.dtype}, and a weight of "
            f"{None if codes is None else tuple(codes.shape)}. The natural order has matrices of "
            "float16 or bfloat16; that of packed tiles is not read."
        )
    (width, rank), dtype, out = down_IR.shape, down_IR.dtype, codes.shape[0]
    expected = {
        "weight": ((out, width // 2), torch.int8),
        "weight_scale": ((width // 64, out), dtype),
        "weight_proj_down": ((width, rank), dtype),
        "weight_proj_up": ((out, rank), dtype),
        "weight_smooth_factor": ((width,), dtype),
        "bias": ((out,), dtype),
    }
    check_tensors(name, held, expected, optional=["bias"])
    weight = QuantizedTensor(
        codes.view(torch.uint8),
        held["weight_scale"].T,
        None,
        (out, width),
        get_format("int4", scale=SCALE_NAMES[dtype]),
    )
    return EngineLayer(
        weight=weight,
        activation=_activation(unsigned, dtype),
        dtype=dtype,
        smooth_I=held["weight_smooth_factor"],
        shift=GELU_SHIFT if unsigned else 0.0,
        down_IR=down_IR,
        up_OR=held["weight_proj_up"],
        bias_O=held.get("bias"),
    )


def _unsigned(path: Path, layers: Collection[str]) -> set[str]:
    """The layers that the metadata or config.json calls unsigned; a warning if neither says."""
    said = metadata_object(path, METADATA) or quantization_config(path)
    if "act_unsigned" not in said:
        log.warning(
            "'%s' does not say which layers have unsigned activations (act_unsigned): all are read "
            "as signed. If its images are wrong, ask who made it.",
            path,
        )
        return set()
    if unknown := sorted(set(said["act_unsigned"]) - set(layers)):
        raise LoraqError(f"act_unsigned names '{unknown[0]}', which '{path}' does not hold.")
    return set(said["act_unsigned"])


TARGET = Target(
    name="comfy-kitchen",
    description="row-major SVDQuant INT4 with a 16-bit branch",
    readers="comfy-kitchen 0.2.40 (its Python API and custom nodes; not stock ComfyUI)",
    hardware="CUDA from sm80, HIP, Ascend, CPU",
    refuse=refuse,
    losses=losses,
    write=write,
    detect=detect,
    read=read,
)
