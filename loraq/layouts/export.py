"""`loraq.export`: write a packed model in another program's layout, and measure what it costs.

Refusals come first, then the losses in words; the files are written aside, read back by the strict
reader and measured, and only then take their name.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loraq.errors import LoraqError, unknown
from loraq.layers.linear import QuantizedLinear
from loraq.layouts.importing import find_layout
from loraq.layouts.measuring import Pictures, check_prompts, differences, random_rows
from loraq.layouts.opening import open_checkpoint
from loraq.layouts.refusals import refuse_range
from loraq.layouts.targets import Source, Target, find_target
from loraq.models.adapters import refuse_adapters
from loraq.models.denoisers import TRANSFORMER, dtype_of, parts
from loraq.quantization.made_from import network_of
from loraq.quantization.model_card import write_card
from loraq.utils.console import size_text
from loraq.utils.disk_errors import reporting_disk_errors
from loraq.utils.files import folder_bytes, temporary_name

log = logging.getLogger(__name__)

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
SHOWN = 4


@dataclass(frozen=True)
class Exported:
    """What was written, or with dry_run would be, and what it costs.

    layers: name → relative difference of the outputs of the exported and the packed layer.
    captured: whether their inputs come from images; otherwise they are random.
    psnr: of each image by the exported network, to that by the packed one, in dB.
    """

    target: str
    folder: Path | None
    losses: Sequence[str]
    layers: Mapping[str, float]
    captured: bool
    psnr: Sequence[float] = ()
    size: int = 0

    def text(self) -> str:
        """What was measured, for a terminal; of a dry run, the losses."""
        if self.folder is None:
            losses = [f"{self.target}: {loss}" for loss in self.losses]
            return "\n".join([*losses, "Nothing was written (dry run)."])
        values = sorted(self.layers.values())
        worst = sorted(self.layers, key=lambda name: self.layers[name], reverse=True)[:SHOWN]
        inputs = "captured" if self.captured else "random"
        lines = [
            f"Outputs of {len(values)} layers on {inputs} inputs differ by "
            f"{values[len(values) // 2]:.2e} (median) to {values[-1]:.2e} (relative):",
            *(f"  {self.layers[name]:.2e}  {name}" for name in worst),
        ]
        if self.psnr:
            shown = " ".join(f"{value:.2f}" for value in self.psnr)
            lines.append(f"PSNR of the images to the packed model's: {shown} dB")
        return "\n".join([*lines, f"{self.folder} ({size_text(self.size)})"])

    def plain(self) -> dict[str, Any]:
        """The values for a JSON file."""
        folder = None if self.folder is None else str(self.folder)
        psnr = [value if math.isfinite(value) else None for value in self.psnr]  # None: equal
        return {**vars(self), "folder": folder, "layers": dict(self.layers), "psnr": psnr}


def export(
    model: Any,
    folder: str | Path,
    to: str,
    *,
    dtype: str | None = None,
    prompts: Sequence[str] = (),
    call: Mapping[str, Any] | None = None,
    dry_run: bool = False,
    progress: bool = True,
) -> Exported:
    """Write a packed model as the layout `to` (`loraq export --list`) into a new folder.

    model: a pipeline or its transformer, or the folder of a saved one. Of a pipeline, all
        components are written.
    dtype: float16 or bfloat16, of everything but the codes; None: the model's if it has 16 bits,
        else float16.
    prompts: images are made from them, with the arguments `call` of the pipeline, before and after,
        and layers are compared on their inputs; without them, inputs are random.
    dry_run: refusals and losses only.

    Raises LoraqError, before anything is written, for layers that the layout cannot express.
    """
    target, folder = find_target(to), Path(folder)
    if dtype is not None and dtype not in DTYPES:
        raise unknown("dtype of an export", dtype, DTYPES)
    if not dry_run and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LoraqError(f"'{folder}' exists. Give a new folder, or remove this one.")
    opened = open_checkpoint(model) if isinstance(model, str | Path) else model
    check_prompts(opened, prompts, call)
    network = network_of(opened)
    sources = {
        name: replace(_source(net, dtype), captured=bool(prompts))
        for name, net in parts(network).items()
    }
    _refuse(target, sources)
    losses = list(
        dict.fromkeys(loss for source in sources.values() for loss in target.losses(source))
    )
    if dry_run:
        return Exported(to, None, losses, {}, False)
    for loss in losses:
        log.info("%s: %s", to, loss)
    with torch.no_grad():
        pictures = Pictures.of(opened, network, prompts, call or {}) if prompts else None
        for part, source in sources.items():
            inputs = random_rows(source) if pictures is None else pictures.inputs(part)
            sources[part] = replace(source, inputs=inputs)
        temporary = folder.parent / temporary_name()
        try:
            with reporting_disk_errors(folder):
                written = _write(target, opened, sources, temporary)
                write_card(opened, temporary, use=_use(target, losses))
            layers, psnr = differences(target, sources, written, pictures, progress)
            if folder.is_dir():
                folder.rmdir()
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return Exported(to, folder, losses, layers, bool(prompts), psnr, folder_bytes(folder))


def _use(target: Target, losses: Sequence[str]) -> str:
    """What the card says of the exported files."""
    lines = [
        f"These files have the layout `{target.name}`: {target.description}. "
        f"Read by {target.readers}; hardware: {target.hardware}.",
        "The table above is that of the packed model that was exported. Lost beside it:",
        "\n".join(f"- {loss}" for loss in losses) or "- nothing",
    ]
    return "\n\n".join(lines)


def _source(network: nn.Module, dtype: str | None) -> Source:
    refuse_adapters(network, "which a file has only if quantising fuses it (adapters='fuse')")
    layers = {n: m.tensors for n, m in network.named_modules() if isinstance(m, QuantizedLinear)}
    if not layers:
        raise LoraqError(
            f"This {type(network).__name__} has no packed layers. Quantise it with loraq.quantize, "
            "or load a packed checkpoint."
        )
    own = dtype_of(network)
    default = own if own in DTYPES.values() else torch.float16
    return Source(network, layers, default if dtype is None else DTYPES[dtype])


def _refuse(target: Target, sources: Mapping[str, Source]) -> None:
    """LoraqError with every reason why layers cannot be expressed, and how many there are."""
    counted: Counter[str] = Counter()
    first: dict[str, str] = {}
    for source in sources.values():
        for name in source.layers:
            if reason := _reason(target, source, name):
                counted[reason] += 1
                first.setdefault(reason, name)
    if counted:
        total = sum(len(source.layers) for source in sources.values())
        reasons = [
            f"  {count} of them, such as '{first[reason]}': {reason}."
            for reason, count in counted.most_common(SHOWN)
        ]
        if len(counted) > SHOWN:
            reasons.append(f"  … and {len(counted) - SHOWN} other reasons")
        raise LoraqError(
            f"{target.name} cannot hold {counted.total()} of {total} layers; nothing was written.\n"
            + "\n".join(reasons)
        )


def _reason(target: Target, source: Source, name: str) -> str | None:
    """Why a layer cannot be expressed, without the full stop."""
    reason = target.refuse(source, name) or refuse_range(source, name)
    return None if reason is None else reason.rstrip(".")


def _write(
    target: Target, opened: Any, sources: Mapping[str, Source], folder: Path
) -> dict[str, Path]:
    """Write a network into `folder`, or a pipeline with its networks; returns part → its folder."""
    if isinstance(opened, nn.Module):
        folders = {part: folder / part for part in sources}
    else:
        opened.save_pretrained(folder)
        folders = {part: folder / (part or TRANSFORMER) for part in sources}
        for packed in folders.values():
            shutil.rmtree(packed)
    for part, source in sources.items():
        folders[part].mkdir(parents=True)
        target.write(source, folders[part])
        if find_layout(folders[part]) is not target:
            raise LoraqError(f"{target.name}: what was written is not recognised as this layout.")
    return folders
