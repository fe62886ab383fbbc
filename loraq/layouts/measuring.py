"""How far an exported model is from the packed one: outputs of layers, and images.

Letters: T rows, I in.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from loraq.errors import LoraqError
from loraq.layers.linear import QuantizedLinear
from loraq.layouts.engine_layer import BFLOAT16
from loraq.layouts.engine_linear import EngineLinear
from loraq.layouts.targets import Source, Target
from loraq.models.call import check_call
from loraq.models.denoisers import joined, parts
from loraq.utils.lazy_mapping import LazyMapping
from loraq.utils.texts import first_line, list_of_texts

ROWS = 64
"""Rows of every layer's input that outputs are compared on."""
PER_FORWARD = 8
_RESERVED = {
    "prompt": "captions are given as prompts=[…]",
    "generator": "every image has its own seed",
    "output_type": "arrays are compared",
}


def check_prompts(opened: Any, prompts: Sequence[str], call: Mapping[str, Any] | None) -> None:
    """LoraqError for prompts without a pipeline, and arguments that it does not have."""
    if list_of_texts(prompts, "prompts") and isinstance(opened, nn.Module):
        raise LoraqError(
            f"{len(prompts)} prompts need a pipeline to make images, and this is a "
            f"{type(opened).__name__}. Pass the pipeline, or no prompts."
        )
    if call and not prompts:
        raise LoraqError(f"call={dict(call)!r:.80} has no effect without prompts=[…].")
    if call:
        check_call(opened.__call__, call, _RESERVED, "call")


def random_rows(source: Source) -> Mapping[str, Tensor]:
    """Normal inputs (T, I) of every layer, through a GELU where a layer stands behind one."""

    def rows(name: str) -> Tensor:
        layer = source.layers[name]
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
        x_TI = torch.randn(
            ROWS, layer.weight.shape[1], generator=torch.Generator().manual_seed(seed)
        )
        return gelu(x_TI) if layer.transform.shift else x_TI

    return LazyMapping(list(source.layers), rows)


@dataclass(frozen=True)
class Pictures:
    """Images of the packed model, and rows of the inputs of its layers by name."""

    pipe: Any
    network: nn.Module
    prompts: Sequence[str]
    call: Mapping[str, Any]
    made: np.ndarray
    rows: Mapping[str, Tensor]

    def __repr__(self) -> str:
        return f"Pictures({len(self.made)} images, {len(self.rows)} inputs)"

    @classmethod
    def of(
        cls, pipe: Any, network: nn.Module, prompts: Sequence[str], call: Mapping[str, Any]
    ) -> Pictures:
        """Make the images of a packed pipeline."""
        kept: dict[str, list[Tensor]] = {}

        def keep(name: str) -> Any:
            def hook(module: QuantizedLinear, args: tuple[Tensor, ...]) -> None:
                x = args[0].detach()
                x_TI = (x.movedim(1, -1) if module.convolution else x).flatten(0, -2)
                step = max(1, len(x_TI) // PER_FORWARD)
                kept.setdefault(name, []).append(x_TI[::step][:PER_FORWARD].float().cpu())

            return hook

        packed = {n: m for n, m in network.named_modules() if isinstance(m, QuantizedLinear)}
        handles = [m.register_forward_pre_hook(keep(n)) for n, m in packed.items()]
        try:
            made = _images(pipe, prompts, call)
        finally:
            for handle in handles:
                handle.remove()
        rows = {name: torch.cat(parts) for name, parts in kept.items()}
        if idle := sorted(packed.keys() - rows.keys()):
            raise LoraqError(
                f"No step of these images runs '{idle[0]}' ({len(idle)} layers are not run). Pass "
                "more steps in call=, or no prompts."
            )
        spread = {n: r[:: max(1, len(r) // ROWS)][:ROWS] for n, r in rows.items()}
        return cls(pipe, network, prompts, call, made, spread)

    def inputs(self, part: str) -> dict[str, Tensor]:
        """The rows of one of the networks, by its own names."""
        names = dict(parts(self.network)[part].named_modules())
        return {n: self.rows[joined(part, n)] for n in names if joined(part, n) in self.rows}

    def psnr(self, layers: Mapping[str, nn.Module]) -> list[float]:
        """PSNR in dB of each image when `layers` compute instead of the packed ones."""
        with _instead(self.network, layers):
            found = _images(self.pipe, self.prompts, self.call)
        errors = np.square(found - self.made).reshape(len(found), -1).mean(1).tolist()
        return [math.inf if error == 0 else -10 * math.log10(error) for error in errors]


def _images(pipe: Any, prompts: Sequence[str], call: Mapping[str, Any]) -> np.ndarray:
    """Images (count, …) with values from 0 to 1, of one seed each."""
    generators = [torch.Generator().manual_seed(number) for number in range(len(prompts))]
    try:
        made = pipe(prompt=list(prompts), generator=generators, output_type="np", **call)[0]
    except (TypeError, ValueError) as error:
        raise LoraqError(
            f"{type(pipe).__name__} makes no images with these arguments: {first_line(error)}. "
            "Pass others (call={'height': …}, on the command line --call height=…), or no prompts."
        ) from error
    return np.asarray(made, dtype=np.float64)


@contextlib.contextmanager
def _instead(network: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    own = {name: network.get_submodule(name) for name in layers}
    try:
        for name, layer in layers.items():
            network.set_submodule(name, layer, strict=True)
        yield
    finally:
        for name, layer in own.items():
            network.set_submodule(name, layer, strict=True)


def differences(
    target: Target,
    sources: Mapping[str, Source],
    written: Mapping[str, Path],
    pictures: Pictures | None,
    progress: bool,
) -> tuple[dict[str, float], list[float]]:
    """(layer → ‖y' − y‖ / ‖y‖, PSNR of each image), of the files as their reader computes them."""
    from tqdm import tqdm

    found: dict[str, float] = {}
    exported: dict[str, nn.Module] = {}
    for part, source in sources.items():
        held = target.read(written[part]).layers
        if missing := sorted(set(source.layers) ^ set(held)):
            raise LoraqError(f"{target.name}: '{missing[0]}' was not read back as it was written.")
        bar = tqdm(source.layers, desc="compare", unit="layer", disable=not progress)
        for name in bar:
            packed = source.packed(name)
            x = source.inputs[name].to(packed.get_buffer("weight_codes").device)
            x = x.T[None, :, :, None] if packed.convolution else x
            layer = replace(held[name], dtype=source.dtype)  # a layer without a bias may not say
            module = EngineLinear(layer, packed.convolution).to(x.device)
            y = packed(x)
            packed.set_compute(packed.compute)  # frees the dequantised weights that it keeps
            error = float((module(x) - y).norm() / y.norm().clamp_min(1e-30))
            if not math.isfinite(error):
                raise LoraqError(
                    f"The outputs of '{name}' are not finite in {source.dtype}. {BFLOAT16}."
                )
            found[joined(part, name)] = error
            if pictures is not None:
                exported[joined(part, name)] = module
    return found, [] if pictures is None else pictures.psnr(exported)
