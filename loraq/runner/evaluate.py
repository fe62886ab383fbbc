"""The last stage: errors per layer, metrics of the images, and the record with both.

The measured values are a separate product that does not depend on the row's names: a row that
several experiments share is measured once; each experiment's record is written from it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from loraq import metrics
from loraq.config import Config
from loraq.errors import LoraqError
from loraq.metrics.common.features import FeatureSet
from loraq.metrics.common.image_set import ImageSet
from loraq.metrics.common.kinds import SETS
from loraq.metrics.common.reading import warn_one_colour
from loraq.metrics.common.result import MetricResult
from loraq.metrics.registry import distribution_extractors, needs_real
from loraq.models.denoisers import denoiser_of
from loraq.models.outputs import output_kind
from loraq.models.pointwise import weight_matrix
from loraq.models.source import model_commit
from loraq.quantization.layer_errors import layer_errors
from loraq.quantization.model import QuantizedModel
from loraq.quantization.rate_distortion import mean_limits
from loraq.results import record as records
from loraq.results.record import Record
from loraq.runner import generate as generation
from loraq.runner.calibrate import load_inputs, measuring_forwards
from loraq.runner.product_keys import make_row
from loraq.runner.real_images import real_images, with_features
from loraq.runner.rows import ACTIVATIONS, REFERENCE, Row, Stage
from loraq.runner.scores import score_images
from loraq.runner.session import Session
from loraq.runner.stages import quantize_row
from loraq.runner.store import Store
from loraq.runner.trajectories import errors_by_role
from loraq.utils.files import write_text
from loraq.utils.kinds import UNITS
from loraq.utils.plain import decode_float, to_plain
from loraq.utils.user_module import is_user_file, user_file_label

MEASURED_FILE = "measured.json"
RECORD_FILE = "record.json"


def measure_row(session: Session, row: Row) -> Record:
    """The row's record: measured values with names, timings and origin; made if it is missing."""
    name = row.keys[Stage.RECORD]
    info = {"kind": row.kind(Stage.RECORD), "units": 1}
    store, scores = session.store, None
    if not any(store.finished(*row.product(stage)) for stage in (Stage.RECORD, Stage.MEASURED)):
        _check_unchanged(row)
        with session.timed("metrics"):
            scores = _scores(session, row)  # without a lock on the whole: processes share it
    with store.lock(Stage.RECORD, name):
        if session.store.finished(Stage.RECORD, name):
            return load_record(session.store, row)
        found = _measured(session, row, scores)
        made = Record(
            key=name,
            experiment=row.config.experiment,
            row=row.name,
            label=row.label,
            config=portable_config(row.config),
            model_hash=row.model_hash,
            timings=_timings(session.store, row),
            **found,
            **records.provenance(row.device),
        )
        with session.store.write(Stage.RECORD, name, info, [RECORD_FILE]) as folder:
            records.save_record(made, folder / RECORD_FILE)
        return load_record(session.store, row)


def _measured(session: Session, row: Row, scores: Scores | None) -> dict[str, Any]:
    """budget, layers, images, metrics and analyses: from the store, measured if missing.

    scores: of this row, if they were read already.
    """
    name = row.keys[Stage.MEASURED]
    info = {"kind": row.kind(Stage.MEASURED), "units": 1}
    path = session.store.path(Stage.MEASURED, name) / MEASURED_FILE
    with session.store.lock(Stage.MEASURED, name):
        if not session.store.finished(Stage.MEASURED, name):
            model = None if row.recipe is None else quantize_row(session, row)
            layers, budget = _errors(session, row, model)
            analyses = {} if model is None else _analyses(session, row, model)
            with session.timed("metrics"):
                images, metrics = _metrics(row, scores or _scores(session, row))
            found = {"layers": layers, "budget": budget, "images": images, "metrics": metrics}
            found["analyses"] = analyses
            text = json.dumps(
                to_plain(found, where="record"), indent=1, ensure_ascii=False, allow_nan=False
            )
            with session.store.write(Stage.MEASURED, name, info, [MEASURED_FILE]) as folder:
                write_text(folder / MEASURED_FILE, text)
    loaded: dict[str, Any] = json.loads(path.read_text(), object_hook=decode_float)
    return loaded


def _check_unchanged(row: Row) -> None:
    """LoraqError if the weights of a metric or the real images have changed since the plan."""
    if make_row(row.config).keys[Stage.MEASURED] != row.keys[Stage.MEASURED]:
        raise LoraqError(
            "Files that the values depend on (weights of metrics, real images) have changed since "
            "this run was planned. Run the same command again; what is finished is not made again."
        )


def _metrics(row: Row, scores: Scores) -> tuple[dict[str, Any], dict[str, Any]]:
    settings, images = row.config.metrics, scores.images
    entries = metrics.measure(
        settings.names,
        images,
        scores.reference,
        scores.real,
        known=scores.known,
        bootstrap=settings.bootstrap,
        **_options(row),
    )
    blank, unit = images.one_colour(settings.workers), UNITS[images.KIND]
    warn_one_colour(blank, len(images), f"{unit} of row '{row.name}'", images.KIND)
    found = {"hash": images.hash, "names": list(images.names), "seen": list(images.seen or ())}
    return found | images.about() | ({"one_colour": blank} if blank else {}), entries


def _options(row: Row) -> dict[str, Any]:
    """What the metrics of single images and of features read of the settings."""
    settings = row.config.metrics
    return {
        "device": row.device,
        "extractor": settings.extractor,
        "workers": settings.workers,
    }


class Scores(NamedTuple):
    """The row's images, those of the 16-bit model, real images, and the values of single images.

    All sets have the features that the metrics compare.
    """

    images: ImageSet
    reference: ImageSet | None
    real: ImageSet | FeatureSet | None
    known: dict[str, MetricResult]


def _scores(session: Session, row: Row) -> Scores:
    """The row's sets and values; processes share what is missing."""
    store, names, options = session.store, row.config.metrics.names, _options(row)
    images, real = image_set(store, row), None
    reference = None if row.recipe is None else reference_set(store, row)
    if needs_real(names):
        real = real_images(row.config)
    compared = {
        need: distribution_extractors(names, need, real, options["extractor"])
        for need in ("real", "reference")
    }
    if isinstance(real, ImageSet):
        with_features(real, compared["real"], store, row)
    if reference is not None:
        with_features(reference, compared["reference"], store, row)
    else:
        compared["reference"] = []
    single, read = [], [*compared["real"], *compared["reference"]]
    for metric in map(metrics.find_metric, names):
        if hasattr(metric, "EXTRACTOR"):  # computed from the features of all images
            read.append(metric.EXTRACTOR)
        elif metric.PER_IMAGE and not (reference is None and metric.NEEDS == "reference"):
            single.append(metric.NAME)
    known = score_images(
        store,
        ("scores", row.keys[Stage.MEASURED]),
        images,
        reference,
        single,
        list(dict.fromkeys(read)),
        options,
        session.bar("metrics"),
    )
    return Scores(images, reference, real, known)


def load_record(store: Store, row: Row) -> Record:
    """The finished record of a row."""
    return records.load_record(store.path(*row.product(Stage.RECORD)) / RECORD_FILE)


def image_set(store: Store, row: Row, key: str = Stage.IMAGES) -> ImageSet:
    """The row's images in the order of its prompts."""
    folder, kind = store.path(Stage.IMAGES, row.keys[key]), output_kind(row.config.model)
    paths = [generation.image_path(folder, prompt, kind) for prompt in row.prompts]
    return SETS[kind].of_prompts(paths, row.prompts)


def reference_set(store: Store, row: Row) -> ImageSet:
    """The 16-bit model's images of the same prompts."""
    return image_set(store, row, REFERENCE)


def _errors(
    session: Session, row: Row, model: QuantizedModel | None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(weight and output error of every layer, memory of the packed layers)."""
    if row.recipe is None or model is None:
        return [], {"bits_per_weight": 16.0, **dict.fromkeys(("nbytes", "rank"))}
    layers, inputs = (
        session.layers(row, row.recipe.skip),
        load_inputs(session, row, Stage.MEASURING_INPUTS),
    )
    with session.timed("metrics"):
        errors = layer_errors(model, denoiser_of(session.pipe(row, text=False)), layers, inputs)
        if row.recipe.allocation.kind != "uniform":
            for entry in errors:
                tensors = model.layers[entry["layer"]]
                entry["rank"] = 0 if tensors.left is None else tensors.left.shape[-1]
                entry["bits"] = tensors.weight.format.bits
    return errors, {
        "bits_per_weight": model.bits_per_weight,
        "branch_bits_per_weight": model.branch_bits_per_weight,
        "nbytes": model.nbytes,
        "rank": model.rank_range if row.recipe.branch.kind != "none" else None,
    }


def _analyses(session: Session, row: Row, model: QuantizedModel) -> dict[str, Any]:
    """The analyses that are set in `metrics.analyses`."""
    wanted = row.config.metrics.analyses
    transformer = denoiser_of(session.pipe(row, text=False))
    found: dict[str, Any] = {}
    if "limits" in wanted:
        weights = {name: weight_matrix(transformer.get_submodule(name)) for name in model.layers}
        found["limits"] = mean_limits(weights, model.bits_per_weight)
    if "steps" in wanted:
        assert row.recipe is not None
        layers = session.layers(row, row.recipe.skip)
        with session.timed("model forward"):
            found["steps"] = errors_by_role(
                transformer, model, layers, measuring_forwards(session, row)
            )
    if "losses" in wanted:
        found["losses"] = {name: notes["losses"] for name, notes in model.info.items()}
        found["seconds"] = {name: notes["seconds"] for name, notes in model.info.items()}
    return found


def _timings(store: Store, row: Row) -> dict[str, float]:
    """Seconds per stage, summed over all attempts."""
    found = {}
    for stage in (*ACTIVATIONS, Stage.QUANTIZED, Stage.IMAGES):
        manifest = store.manifest(*row.product(stage)) if stage in row.keys else None
        if manifest is not None:
            found[stage.value] = float(manifest["info"]["seconds"])
    return found


def portable_config(config: Config) -> dict[str, Any]:
    """The configuration without paths of this machine."""
    plain = to_plain(config)
    plain.pop("output")
    plain["model"]["revision"] = model_commit(config.model)
    path = config.model.path
    if path is not None and not path.startswith("asset:"):
        plain["model"]["path"] = Path(path).name
    if config.quant is not None and is_user_file(config.quant.branch.kind):
        plain["quant"]["branch"]["kind"] = user_file_label(config.quant.branch.kind)
    return plain
