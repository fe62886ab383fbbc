"""Metrics of images that are there: of a saved pipeline's, or of any folder, by the same protocol.

A saved pipeline (packed or not) makes its images first, as a product like any other. Nothing else
of an experiment is needed: neither 16-bit weights nor the run that quantised them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraq import metrics
from loraq.compose import load_rows
from loraq.config import Config
from loraq.data import data_prompts
from loraq.errors import LoraqError
from loraq.metrics.common.image_set import ImageSet
from loraq.runner.plan import check_rows, make_plan
from loraq.runner.real_images import real_images
from loraq.runner.rows import Stage
from loraq.runner.session import Session
from loraq.runner.stages import generate
from loraq.runner.store import Store


@dataclass(frozen=True)
class Scores:
    """What was measured on which images; `packed` where a quantised pipeline made them."""

    images: Path
    metrics: dict[str, Any]
    names: list[str]
    packed: dict[str, Any] | None = None

    def plain(self) -> dict[str, Any]:
        """For a JSON file."""
        return {"metrics": self.metrics, "names": self.names, "packed": self.packed}

    def text(self) -> str:
        """For a reader."""
        lines = [f"{len(self.names)} images in {self.images}"]
        if self.packed is not None:
            lines[0] += f", {self.packed['bits_per_weight']:.3f} bits/weight"
        for name, entry in self.metrics.items():
            arrow = "↑" if entry["direction"] == "higher" else "↓"
            if entry["value"] is None:
                lines.append(f"  {name} {arrow}  –  ({entry['reason']})")
                continue
            line = f"  {name} {arrow}  {entry['value']:.5g}"
            if entry["lo"] is not None:
                line += f"  [{entry['lo']:.5g}, {entry['hi']:.5g}]"
            lines.append(line)
        return "\n".join(lines)


def score(
    target: Path, overrides: Sequence[str], against: Path | None, progress: bool = True
) -> Scores:
    """Scores of `target`: a folder of images NAME.png, or a pipeline in save_pretrained layout.

    overrides: of the configuration, for captions, sampler and metrics. `against`: a folder of the
    images to compare with, pair by pair; without it metrics that need one are left out.
    """
    for folder in (target, against):
        if folder is not None and not folder.is_dir():
            raise LoraqError(f"There is no folder '{folder}'. Give one of images or a pipeline.")
    base, packed = ["method=reference", *overrides], None
    if (target / "model_index.json").is_file():
        base += [f"model.path={target.resolve()}", "model.hub_id=null"]
        config = load_rows(base)[0]
        target, packed = _generate(config, progress)
    config = load_rows(base)[0]
    prompts = data_prompts(config.data)
    images = ImageSet.of_prompts([target / f"{p.name}.png" for p in prompts], prompts)
    reference = None if against is None else ImageSet.of_folder(against, images.names)
    wanted = (*images.paths, *(() if reference is None else reference.paths))
    if missing := [path for path in wanted if not path.is_file()]:
        raise LoraqError(
            f"{len(missing)} of {len(wanted)} images are missing, the first '{missing[0]}'. Make "
            "them, or ask for fewer captions (data.count=, data.split=)."
        )
    real = None if config.data.real is None else real_images(config)
    settings = config.metrics
    metrics.check_metrics(settings.names, real, extractor=settings.extractor)
    found = metrics.measure(
        settings.names,
        images,
        reference=reference,
        real=real,
        device="cpu",
        extractor=settings.extractor,
        bootstrap=settings.bootstrap,
        workers=settings.workers,
    )
    if against is None:
        for entry in found.values():
            if entry["value"] is None:
                entry["reason"] = "needs the images to compare with: --against FOLDER"
    return Scores(target, found, [prompt.name for prompt in prompts], packed)


def _generate(config: Config, progress: bool) -> tuple[Path, dict[str, Any] | None]:
    """The folder of the pipeline's images, made where they are missing; what it packs."""
    from loraq.diffusers_quantizer import packed_layers
    from loraq.quantization.diffusers_packed import PackedQuantizer

    store = Store(config.output)
    row = make_plan([config], store, last=Stage.IMAGES)[0]
    check_rows([row])
    session, packed = Session(store, progress), None
    with session.using(row):
        transformer = session.pipe(row, text=False).transformer
        generate(session, row)
    if isinstance(getattr(transformer, "hf_quantizer", None), PackedQuantizer):
        model = packed_layers(transformer)
        packed = {"bits_per_weight": model.bits_per_weight, "nbytes": model.nbytes}
    return store.path(*row.product(Stage.IMAGES)), packed
