"""nunchaku's single file (1.0) for model classes that it has in Python: INT4 and NVFP4 in tiles.

Layers of one input are fused: q, k and v become `to_qkv`. In INT4, what follows a GELU is shifted
and rounded to unsigned codes. Modulation layers are W4A16 (`modulation.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from loraq.errors import LoraqError
from loraq.formats import Format, dequantize, get_format
from loraq.layouts.engine_layer import EngineLayer
from loraq.layouts.files import read_metadata
from loraq.layouts.fitting import joined_rows
from loraq.layouts.modulation import pack_modulation, unpack_modulation
from loraq.layouts.nunchaku_flux import (
    AFTER_GELU,
    CLASSES,
    MODULATION,
    joined_blocks,
    renamed,
)
from loraq.layouts.single_file import has_mx_scales, quantization, read_single, write_single
from loraq.layouts.targets import Contents, Source, Target
from loraq.layouts.tiled_layer import PRECISIONS, Precision, pack_layer, unpack_layer
from loraq.layouts.tiled_network import refuse_layer, source_precision, tiled_layers, tiled_losses
from loraq.transforms.input_transform import GELU_SHIFT

PREFIX = "Nunchaku"


@dataclass(frozen=True)
class Kind:
    """A model class of nunchaku, which diffusers has without `PREFIX`.

    modules: those of a block, and the layers of diffusers that they hold, in the order of rows.
    after_gelu: modules whose input is shifted in INT4. modulation: W4A16 layers and their fields.
    """

    modules: Mapping[str, tuple[str, ...]]
    after_gelu: tuple[str, ...] = ()
    modulation: Mapping[str, int] = field(default_factory=dict)

    def layers(self, names: Collection[str]) -> dict[str, tuple[str, ...]]:
        """Module → the layers in it, for all modules that hold any of `names`."""
        found = {}
        for name in names:
            for module, parts in self.modules.items():
                for part in parts:
                    if name.endswith(f".{part}"):
                        stem = name.removesuffix(part)
                        found[stem + module] = tuple(stem + other for other in parts)
        return found


def _alone(*names: str) -> dict[str, tuple[str, ...]]:
    return {name: (name,) for name in names}


KINDS = {
    "ZImageTransformer2DModel": Kind(
        {
            "attention.to_qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
            "feed_forward.net.0.proj": ("feed_forward.w3", "feed_forward.w1"),
            "feed_forward.net.2": ("feed_forward.w2",),
            **_alone("attention.to_out.0"),
        }
    ),
    "QwenImageTransformer2DModel": Kind(
        {
            "attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
            "attn.add_qkv_proj": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            **_alone("attn.to_out.0", "attn.to_add_out", "img_mlp.net.0.proj", "img_mlp.net.2"),
            **_alone("txt_mlp.net.0.proj", "txt_mlp.net.2"),
        },
        after_gelu=("img_mlp.net.2", "txt_mlp.net.2"),
        modulation={"img_mod.1": 6, "txt_mod.1": 6},
    ),
}


def refuse(source: Source, name: str) -> str | None:
    """A class that nunchaku does not have, and a layer whose module cannot be made."""
    kind = KINDS.get(type(source.network).__name__)
    if kind is None:
        return (
            f"nunchaku has no class for {type(source.network).__name__} that this file can hold "
            f"({', '.join(KINDS)}). Export to nunchaku_lite"
        )
    every = kind.layers([module for module, _ in source.network.named_modules()]).values()
    if missing := sorted({part for parts in every for part in parts} - set(source.layers)):
        return f"nunchaku's class quantises '{missing[0]}' too, which is skipped. Empty quant.skip"
    modules = kind.layers([name])
    if not modules:
        return "nunchaku's class has it in 16 bits. Add it to quant.skip"
    ((module, parts),) = modules.items()
    first, layer = source.layers[parts[0]], source.layers[name]
    shared = (
        _same(first.transform.smooth_I, layer.transform.smooth_I)
        and first.transform.shift == layer.transform.shift
        and (first.right is None) == (layer.right is None)
    )
    if shared and first.right is not None and layer.right is not None:
        shared = first.right is layer.right or torch.equal(
            dequantize(first.right), dequantize(layer.right)
        )
    if not shared:
        return (
            f"nunchaku fuses it with '{parts[0]}', and the two have different smoothing or factors "
            "R. Quantise with quant.branch.share_qkv=true, or export to nunchaku_lite"
        )
    shifted = layer.transform.shift == GELU_SHIFT and module.endswith(kind.after_gelu)
    if shifted and layer.weight.format.name == "int4":
        unshifted = replace(layer, transform=replace(layer.transform, shift=0.0))
        source = replace(source, layers={**source.layers, name: unshifted})
    return refuse_layer(source, name, ["int4", "nvfp4"], pads=False)


def losses(source: Source) -> list[str]:
    """Those of the tiles; in INT4 the unsigned inputs; and the modulation's rounding, measured."""
    kind, found = KINDS[type(source.network).__name__], tiled_losses(source)
    if kind.after_gelu and source_precision(source).name == "int4":
        found.append(
            f"Inputs behind a GELU are shifted by {GELU_SHIFT} and rounded to unsigned codes."
        )
    errors = []
    for module, fields in _modulation(source.network, kind).values():
        own = module.weight.detach()
        held = pack_modulation(own, module.bias.detach(), fields, source.dtype)
        found_OI = unpack_modulation("layer", held, fields)["layer.weight"]
        errors.append(float((found_OI - own).norm() / own.norm()))
    if errors:
        found.append(
            f"The weights of {len(errors)} modulation layers are rounded to 4 bits, which nunchaku "
            f"has in no other form (relative error up to {max(errors):.2g})."
        )
    return found


def write(source: Source, folder: Path) -> None:
    """One file in the names and the order of nunchaku's class."""
    kind, precision = KINDS[type(source.network).__name__], source_precision(source)
    layers = tiled_layers(source)
    tensors: dict[str, dict[str, Tensor]] = {}
    for module, parts in kind.layers(layers).items():
        joined = joined_rows([layers[part] for part in parts])
        if module.endswith(kind.after_gelu) and precision.name == "int4":
            joined = _unsigned(joined)
        tensors[module] = pack_layer(joined)
        tensors[module]["smooth_factor_orig"] = tensors[module]["smooth_factor"].clone()
    others = source.other_tensors()
    for name, (layer, fields) in _modulation(source.network, kind).items():
        own = layer.weight.detach(), layer.bias.detach()
        tensors[name] = pack_modulation(*own, fields, source.dtype)
        others = {key: t for key, t in others.items() if not key.startswith(f"{name}.")}
    metadata = quantization(precision, next(iter(layers.values())).rank)
    metadata["model_class"] = PREFIX + type(source.network).__name__
    write_single(folder, source.network, tensors, others, metadata)


def detect(path: Path) -> bool:
    """By the class in the metadata; layouts that nunchaku does not read say more."""
    metadata = read_metadata(path)
    other = "lowrank_quant" in metadata or has_mx_scales(metadata)
    return metadata.get("model_class", "").startswith(PREFIX) and not other


def read(path: Path) -> Contents:
    """Layers by the names of nunchaku's modules, and modulation layers by value."""
    name = read_metadata(path)["model_class"].removeprefix(PREFIX)
    flux = name in CLASSES
    kind = Kind({}, AFTER_GELU, MODULATION) if flux else KINDS.get(name)
    if kind is None:
        raise LoraqError(
            f"'{path}' is of {PREFIX}{name}. Only files of {', '.join((*KINDS, *CLASSES))} are "
            "read: other classes of nunchaku have convolutions, or are UNets. Use a nunchaku_lite "
            "file of this model."
        )
    groups, others = read_single(path)
    if flux:
        groups, others = renamed(groups), renamed(others)
    layers = {}
    for module, held in groups.items():
        if module.endswith(tuple(kind.modulation)):
            fields = next(n for end, n in kind.modulation.items() if module.endswith(end))
            others |= unpack_modulation(module, held, fields)
            continue
        scales = held.get("wscales")
        eight = scales is not None and scales.dtype == torch.float8_e4m3fn
        precision = PRECISIONS["nvfp4" if eight else "int4"]
        layer = unpack_layer(module, held, precision, ("bias", "wcscales", "wtscale"))
        if module.endswith(kind.after_gelu) and not eight:
            layer = replace(layer, activation=_uint4(layer, precision), shift=GELU_SHIFT)
        layers[module] = layer
    return Contents(joined_blocks(layers) if flux else layers, _plain(kind, others))


def _unsigned(layer: EngineLayer) -> EngineLayer:
    """The layer with an input shifted by GELU_SHIFT, of which the bias takes what it adds."""
    bias_O = layer.bias_O
    if not layer.shift:
        assert not isinstance(layer.weight, Tensor)
        weight_OI = dequantize(layer.weight).double()
        if layer.smooth_I is not None:
            weight_OI = weight_OI / layer.smooth_I.double()
        added_O = GELU_SHIFT * weight_OI.sum(-1)
        bias_O = (-added_O if bias_O is None else bias_O.double() - added_O).to(layer.dtype)
    activation = _uint4(layer, PRECISIONS["int4"])
    return replace(layer, activation=activation, shift=GELU_SHIFT, bias_O=bias_O)


def _uint4(layer: EngineLayer, precision: Precision) -> Format:
    return precision.of(get_format("uint4"), layer.dtype)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))


def _plain(kind: Kind, others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that are not quantised by the names of diffusers: fused ones in equal parts."""
    found: dict[str, Tensor] = {}
    for name, tensor in others.items():
        layer, _, suffix = name.rpartition(".")
        ends = [end for end in kind.modules if layer.endswith(f".{end}")]
        parts = [layer.removesuffix(end) + part for end in ends for part in kind.modules[end]]
        rows = tensor.chunk(len(parts)) if parts else [tensor]
        names = [f"{part}.{suffix}" for part in parts] or [name]
        found |= dict(zip(names, rows, strict=True))
    return found


def _modulation(network: nn.Module, kind: Kind) -> dict[str, tuple[nn.Linear, int]]:
    """The modulation layers, and the number of fields of each."""
    return {
        name: (module, fields)
        for name, module in network.named_modules()
        for end, fields in kind.modulation.items()
        if name.endswith(f".{end}") and isinstance(module, nn.Linear)
    }


TARGET = Target(
    name="nunchaku",
    description="nunchaku's single file: SVDQuant INT4 or NVFP4 in tiles, fused q/k/v",
    readers=f"nunchaku 1.0 ({', '.join(KINDS)})",
    hardware="INT4: CUDA sm75 to sm89; NVFP4: sm120",
    refuse=refuse,
    losses=losses,
    write=write,
    detect=detect,
    read=read,
)
