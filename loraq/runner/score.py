"""Metrics of a saved pipeline or of any folder of images, videos or clips of sound.

They are computed by the protocol of the experiments.

A saved pipeline (packed or not) first generates its images, which are cached like any product.
Neither the 16-bit weights nor the products of the run that quantised them are needed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraq import metrics
from loraq.compose import load_rows
from loraq.config import Config
from loraq.data import data_prompts
from loraq.errors import LoraqError
from loraq.metrics.common.features import FeatureSet
from loraq.metrics.common.fetch import fetch_weights
from loraq.metrics.common.image_set import ImageSet
from loraq.metrics.common.kinds import SETS, check_same_kind, set_of_folder
from loraq.metrics.common.published import missing_weights
from loraq.metrics.common.reading import warn_one_colour
from loraq.models.denoisers import denoiser_of, parts
from loraq.models.outputs import output_kind
from loraq.runner.plan import check_measuring, check_rows, plan_rows
from loraq.runner.product_keys import find_device, thread_count
from loraq.runner.rows import Stage
from loraq.runner.session import Session
from loraq.runner.stages import generate_row
from loraq.runner.store import Store
from loraq.utils.kinds import UNITS, Kind
from loraq.utils.manifest import check_product, read_manifest
from loraq.utils.process import own_gpu, torch_threads

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scores:
    """Metrics of the images in a folder; `packed`: memory of the pipeline that made them.

    one_colour: the names of the images whose pixels are all equal. about: of videos and clips,
    their kind, frames or sampling rate, and seconds.
    """

    images: Path
    metrics: dict[str, Any]
    names: list[str]
    packed: dict[str, Any] | None = None
    one_colour: Sequence[str] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def unit(self) -> str:
        """What several of the outputs are called."""
        kind: Kind = self.about.get("kind", "image")
        return UNITS[kind]

    def plain(self) -> dict[str, Any]:
        """The values for a JSON file."""
        plain = {"metrics": self.metrics, "names": self.names, "packed": self.packed}
        return plain | {"one_colour": list(self.one_colour), **self.about}

    def text(self) -> str:
        """One line per metric, with its confidence interval."""
        lines = [f"{len(self.names)} {self.unit} in {self.images}"]
        if self.packed is not None:
            lines[0] += f", {self.packed['bits_per_weight']:.3f} bits/weight"
        for name, entry in self.metrics.items():
            arrow = "↑" if entry["direction"] == "higher" else "↓"
            if entry["value"] is None:
                lines.append(f"  {name} {arrow}  –  ({self._reason(entry)})")
                continue
            line = f"  {name} {arrow}  {entry['value']:.5g}"
            interval = entry["lo"] is not None
            reason = f"({self._reason(entry)})"
            found = f"[{entry['lo']:.5g}, {entry['hi']:.5g}]" if interval else reason
            lines.append(f"{line}  {found}")
        return "\n".join(lines)

    def _reason(self, entry: Mapping[str, Any]) -> str:
        return str(entry["reason"]).replace("images", self.unit)

    def __repr__(self) -> str:
        measured = ", ".join(self.metrics)
        return f"Scores({len(self.names)} {self.unit} in '{self.images}': {measured})"


def score_images(
    target: Path, overrides: Sequence[str], against: Path | None, progress: bool = True
) -> Scores:
    """Scores of `target`: a folder of images NAME.png, or a pipeline in save_pretrained layout.

    A folder may also hold videos (animated NAME.png) or clips of sound (NAME.wav).

    overrides: settings of captions, sampler and metrics. against: a folder of reference images of
    the same names; without it, metrics that need a reference have no value. Raises LoraqError if
    a folder or an image is missing, or if an image is a run's and was changed.
    """
    for folder in (target, against):
        if folder is not None and not folder.is_dir():
            raise LoraqError(
                f"There is no folder '{folder}'. Pass a folder of images or a saved pipeline."
            )
    is_pipeline = (target / "model_index.json").is_file()
    base, packed = ["method=reference", *overrides], None
    if is_pipeline:
        base += [f"model.path={target.resolve()}", "model.hub_id=null"]
    config = load_rows(base)[0]
    prompts, settings = data_prompts(config.data), config.metrics
    names = [prompt.name for prompt in prompts]
    own = None if is_pipeline else set_of_folder(target, names)
    reference = None if against is None else set_of_folder(against, names)
    for given in filter(None, (own, reference)):
        product = given.paths[0].parent
        if read_manifest(product) is not None:
            check_product(product, [path.name for path in given.paths])
    real = _check_inputs(config, own, reference)
    if missing := missing_weights(settings.names, settings.extractor):
        fetch_weights(missing, log.info, progress)
    if own is None:
        target, packed = _generate_images(config, progress)
        own = SETS[output_kind(config.model)].of_folder(target, names)
    images = type(own).of_prompts(own.paths, prompts)
    device = find_device(config)
    with torch_threads(thread_count(config)), own_gpu(device):
        found = metrics.measure(
            settings.names,
            images,
            reference=reference,
            real=real,
            device=device,
            extractor=settings.extractor,
            bootstrap=settings.bootstrap,
            no_reference="needs reference images: --against FOLDER",
            workers=settings.workers,
        )
    blank = images.one_colour(settings.workers)
    warn_one_colour(blank, len(images), UNITS[images.KIND], images.KIND)
    if reference is not None:
        others = reference.one_colour(settings.workers)
        warn_one_colour(others, len(reference), "references", images.KIND)
    return Scores(target, found, names, packed, blank, images.about())


def _check_inputs(
    config: Config, own: ImageSet | None, reference: ImageSet | None
) -> ImageSet | FeatureSet | None:
    """The real images, after all images were read once; LoraqError for what cannot be measured.

    own: None if the pipeline is still to make them.
    """
    workers = config.metrics.workers
    kind = output_kind(config.model) if own is None else own.KIND
    sampled = set() if config.model.size is None else {config.model.size}
    sizes = sampled if own is None else own.sizes(workers)
    sides = (size[0] if kind == "audio" else min(size) for size in sizes)
    real = check_measuring(config, min(sides, default=None), find_device(config), kind)
    if reference is not None and own is not None:
        check_same_kind(own, reference)
    if reference is not None and len(sizes := sizes | reference.sizes(workers)) > 1:
        raise LoraqError(
            f"The {UNITS[kind]} and their references have the sizes {sorted(sizes)} "
            f"({'samples, channels' if kind == 'audio' else 'height, width'}), and are compared at "
            "one size. Make them of one size."
        )
    if isinstance(real, ImageSet):
        real.sizes(workers)
    return real


def _generate_images(config: Config, progress: bool) -> tuple[Path, dict[str, Any] | None]:
    """Make the pipeline's missing images; returns their folder and the packed layers' memory."""
    # imports diffusers, which a folder of images does not need
    from loraq.diffusers_quantizer import packed_layers
    from loraq.quantization.diffusers_packed import PackedQuantizer

    session, packed = Session(Store(config.output), progress), None
    row = plan_rows([config], session.store, last=Stage.IMAGES)[0]
    check_rows([row])
    with session.using(row):
        denoiser = denoiser_of(session.pipe(row, text=False))
        generate_row(session, row)
    networks = parts(denoiser).values()
    if any(isinstance(getattr(net, "hf_quantizer", None), PackedQuantizer) for net in networks):
        model = packed_layers(denoiser)
        packed = {"bits_per_weight": model.bits_per_weight, "nbytes": model.nbytes}
    return session.store.path(*row.product(Stage.IMAGES)), packed
