"""Metrics of a pipeline, saved or in memory, or of any folder of images, videos or clips of sound.

They are computed by the protocol of the experiments.

A saved pipeline, whatever quantised it, first generates its images, which are cached like any
product. Neither the 16-bit weights nor the products of the run that quantised it are needed. The
images of a pipeline in memory are not cached: nothing names what it computes.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loraq import metrics
from loraq.compose import load_rows
from loraq.config import Config
from loraq.data import Prompt, data_prompts
from loraq.errors import LoraqError
from loraq.metrics.common.features import FeatureSet
from loraq.metrics.common.fetch import fetch_weights
from loraq.metrics.common.image_set import SUFFIXES, ImageSet
from loraq.metrics.common.kinds import SETS, check_same_kind, set_of_folder
from loraq.metrics.common.published import missing_weights
from loraq.metrics.common.reading import warn_one_colour
from loraq.models.denoisers import denoiser_of, device_of, dtype_of
from loraq.models.outputs import output_kind
from loraq.models.source import pipeline_of
from loraq.runner.beside import (
    check_same_images,
    check_same_names,
    check_same_settings,
    images_of,
    read_beside,
    sixteen_bit,
)
from loraq.runner.evaluate import portable_config
from loraq.runner.plan import check_measuring
from loraq.runner.product_keys import find_device, thread_count
from loraq.runner.scored import Made, Scores, scored_record
from loraq.runner.scored_pipeline import (
    GGUF,
    is_emulated,
    run_in_memory,
    run_saved,
    with_emulated,
    with_gguf,
)
from loraq.runner.store import Store
from loraq.utils.kinds import UNITS
from loraq.utils.manifest import check_product, read_manifest
from loraq.utils.process import own_gpu, torch_threads

log = logging.getLogger(__name__)

_HUB = re.compile(r"[\w.-]+/[\w.-]+")
_SUFFIXES = {suffix for suffixes in SUFFIXES.values() for suffix in suffixes}


def score_images(
    target: Path,
    overrides: Sequence[str],
    against: Path | None,
    progress: bool = True,
    beside: Sequence[Path] = (),
    name: str | None = None,
) -> Scores:
    """Scores of `target`.

    target: a folder of images NAME.png, also of videos (animated NAME.png) or clips of sound
        (NAME.wav), a pipeline in save_pretrained layout or OWNER/NAME on the hub, or a FILE.gguf
        with the transformer of the pipeline model.path.
    overrides: settings of captions, sampler and metrics. against: a folder of reference images of
        the same names; without it, metrics that need a reference have no value.
    beside: records or experiments (`read_beside`) that this row is compared with. Their 16-bit
        row's images are the reference, if there is no other.
    name: of the row, by default that of the target.

    Raises LoraqError if a folder or an image is missing, or if an image is a run's and was changed.
    """
    config = load_rows([*_settings_of(target, overrides), *overrides])[0]
    records, _ = read_beside(beside)
    row = name or target.resolve().name.removesuffix(GGUF)
    if any(found.row == row for found in records):
        raise LoraqError(f"--beside has a row '{row}' already. Give this one another: --name NAME")
    if of_images := target.is_dir() and not _is_pipeline(target):
        config, prompts = _matched(target, config, overrides)
    else:
        check_same_settings(portable_config(config), records)
        prompts = data_prompts(config.data)
    names, given, original = [prompt.name for prompt in prompts], against, sixteen_bit(records)
    check_same_names(names, records)
    if given is None and original is not None:
        against = images_of(original, Store(config.output))
    own = set_of_folder(target, names) if of_images else None
    reference = _reference(against, names)
    if given is not None and original is not None and reference is not None:
        check_same_images(reference, original, given)
    real = _check_inputs(config, own, reference, progress)
    made, images = None, target
    if own is None:
        if target.suffix == GGUF:
            images, made = run_in_memory(with_gguf(config, target), config, None, progress)
        elif is_emulated(config):
            images, made = run_in_memory(with_emulated(config), config, None, progress)
        else:
            images, made = run_saved(config, progress)
        own = SETS[output_kind(config.model)].of_folder(images, names)
    return _measure(config, row, images, own, prompts, reference, real, made)


def score(
    pipe: Any,
    *overrides: str,
    against: str | Path | None = None,
    images: str | Path | None = None,
    name: str | None = None,
    progress: bool = True,
) -> Scores:
    """Scores of a diffusers pipeline in memory, whatever quantised it, by the protocol.

    `loraq.score(pipe, "model=pixart_sigma", "data.count=32", against="16_bit_images")`

    overrides: settings of the model's sampler, captions and metrics, as on the command line.
    against: a folder of reference images. images: an empty or new folder for the pipeline's images,
        by default a new one in OUTPUT/scored. name: of the row, by default the pipeline's class.

    Quantise the pipeline before; its memory is read before it runs. Raises LoraqError if the
    settings are those of another class, or for an image folder that holds files already. The
    record has the pipeline's own dtype and device.
    """
    dtype = str(dtype_of(denoiser_of(pipe))).removeprefix("torch.")
    actual = [f"model.dtype={dtype}", f"device={device_of(pipe)}"]
    config = load_rows([*_settings_of_pipe(pipe, overrides), *overrides, *actual])[0]
    if (wanted := pipeline_of(config.model)) is not type(pipe):
        raise LoraqError(
            f"The settings are those of a {wanted.__name__} (model={config.model.name}), and this "
            f"is a {type(pipe).__name__}. Pass 'model=NAME', or 'model=hub', 'model.path=FOLDER'."
        )
    prompts = data_prompts(config.data)
    reference = _reference(against, [prompt.name for prompt in prompts])
    real = _check_inputs(config, None, reference, progress)
    folder, made = run_in_memory(pipe, config, images, progress)
    own = SETS[output_kind(config.model)].of_folder(folder, [prompt.name for prompt in prompts])
    row = name or type(pipe).__name__
    return _measure(config, row, folder, own, prompts, reference, real, made)


def _settings_of(target: Path, overrides: Sequence[str]) -> list[str]:
    """The overrides that stand before the user's: the 16-bit row of the pipeline `target`."""
    base, given = ["method=reference"], _keys(overrides)
    if _is_pipeline(target):
        own = [f"model.path={target.resolve()}", "model.hub_id=null"]
        return base if "model.path" in given else base + own
    if target.is_dir():
        return base
    if target.suffix == GGUF and target.is_file():
        if not any(key.split(".")[0] == "model" for key in given):
            raise LoraqError(
                f"'{target}' holds a transformer alone. Add the pipeline that it belongs to: "
                "model=NAME, or model=hub model.path=FOLDER."
            )
        return base
    if target.suffix != GGUF and _HUB.fullmatch(str(target)):
        model = [] if "model" in given else ["model=hub"]
        return [*base, *model, f"model.hub_id={target}", "model.path=null"]
    raise LoraqError(
        f"There is no folder '{target}'. Pass a folder of images or a saved pipeline, a FILE.gguf, "
        "or OWNER/NAME on the hub."
    )


def _settings_of_pipe(pipe: Any, overrides: Sequence[str]) -> list[str]:
    """`_settings_of` where a pipeline in memory was loaded from, unless the user names a model."""
    source, given = Path(str(pipe.name_or_path)), _keys(overrides)
    named = given & {"model", "model.path", "model.hub_id"}
    known = _is_pipeline(source) or _HUB.fullmatch(str(source))
    return ["method=reference"] if named or not known else _settings_of(source, overrides)


def _keys(overrides: Sequence[str]) -> set[str]:
    return {override.partition("=")[0].lstrip("+~") for override in overrides}


def _is_pipeline(target: Path) -> bool:
    return (target / "model_index.json").is_file()


def _matched(
    target: Path, config: Config, overrides: Sequence[str]
) -> tuple[Config, Sequence[Prompt]]:
    """The prompts of a folder's images; without captions, its file names in their place.

    Metrics that read captions or real images are left out then.
    """
    prompts = data_prompts(config.data)
    stems = sorted({path.stem for path in target.iterdir() if path.suffix.lower() in _SUFFIXES})
    of_captions = any(key.split(".")[0] == "data" for key in _keys(overrides))
    if of_captions or not stems or {prompt.name for prompt in prompts} & {*stems}:
        return config, prompts
    wanted = config.metrics.names
    kept = tuple(n for n in wanted if metrics.find_metric(n).NEEDS in ("reference", "images"))
    left_out = ", ".join(n for n in wanted if n not in kept)
    if left_out:
        if not kept or any(key.startswith("metrics") for key in _keys(overrides)):
            raise LoraqError(
                f"metrics.names: {left_out} need captions or real images, and '{target}' has no "
                "image of the default captions. Add data=file data.captions=FILE, or leave them "
                "out."
            )
        log.warning("Matched by file name, without captions: %s left out.", left_out)
    settings = dataclasses.replace(config.metrics, names=kept)
    return dataclasses.replace(config, metrics=settings), [
        Prompt(name=stem, prompt="", seen=False) for stem in stems
    ]


def _reference(against: str | Path | None, names: Sequence[str]) -> ImageSet | None:
    if against is None:
        return None
    if not Path(against).is_dir():
        raise LoraqError(f"There is no folder '{against}'. Pass a folder of reference images.")
    return set_of_folder(Path(against), names)


def _measure(
    config: Config,
    row: str,
    folder: Path,
    own: ImageSet,
    prompts: Sequence[Prompt],
    reference: ImageSet | None,
    real: ImageSet | FeatureSet | None,
    made: Made | None,
) -> Scores:
    settings, device = config.metrics, find_device(config)
    images = type(own).of_prompts(own.paths, prompts)
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
    scored = Scores(folder, scored_record(config, row, images, found, made, device), made)
    blank = scored.record.images.get("one_colour", [])
    warn_one_colour(blank, len(images), UNITS[images.KIND], images.KIND)
    if reference is not None:
        others = reference.one_colour(settings.workers)
        warn_one_colour(others, len(reference), "references", images.KIND)
    return scored


def _check_inputs(
    config: Config, own: ImageSet | None, reference: ImageSet | None, progress: bool
) -> ImageSet | FeatureSet | None:
    """The real images, after all images were read once; LoraqError for what cannot be measured.

    own: None if the pipeline is still to make them. Missing weights of metrics are downloaded.
    """
    for given in filter(None, (own, reference)):
        product = given.paths[0].parent
        if read_manifest(product) is not None:
            check_product(product, [path.name for path in given.paths])
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
    if missing := missing_weights(config.metrics.names, config.metrics.extractor):
        fetch_weights(missing, log.info, progress)
    return real
