"""The last stage: errors per layer, metrics of the images, and the record of both.

What was measured is a product of its own, without the row's names: a row that several experiments
share is measured once, and each experiment's record is written from it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loraq import metrics
from loraq.config import Config
from loraq.metrics.common.image_set import ImageSet
from loraq.models.pointwise import weight_matrix
from loraq.quantization.layer_errors import layer_errors
from loraq.quantization.model import QuantizedModel
from loraq.quantization.rate_distortion import mean_limits
from loraq.results import record as records
from loraq.results.record import Record
from loraq.runner import generate as generation
from loraq.runner.calibrate import forwards, rows
from loraq.runner.product_keys import ACTIVATIONS, Row, stage_kind
from loraq.runner.real_images import real_images, with_features
from loraq.runner.session import Session
from loraq.runner.stages import quantise
from loraq.runner.store import Store
from loraq.runner.trajectories import errors_by_role
from loraq.utils.files import write_bytes
from loraq.utils.plain import decode_float, to_plain
from loraq.utils.user_module import is_own_file, label

MEASURED_FILE = "measured.json"
RECORD_FILE = "record.json"


def measure(session: Session, row: Row) -> Record:
    """The row's record: what was measured, with its names, timings and origin."""
    name = row.keys["record"]
    info = {"kind": stage_kind(row, "record"), "units": 1}
    with session.store.lock("record", name):
        if session.store.finished("record", name):
            return load_record(session.store, row)
        found = _measured(session, row)
        made = Record(
            key=name,
            experiment=row.config.experiment,
            row=row.name,
            label=row.label,
            config=_portable(row.config),
            model_hash=row.model_hash,
            timings=_timings(session.store, row),
            **found,
            **records.origin(row.device),
        )
        with session.store.write("record", name, info) as folder:
            records.save(made, folder / RECORD_FILE)
        return load_record(session.store, row)


def _measured(session: Session, row: Row) -> dict[str, Any]:
    """budget, layers, images, metrics, analyses: read where they are there, else measured."""
    name = row.keys["measured"]
    info = {"kind": stage_kind(row, "measured"), "units": 1}
    path = session.store.path("measured", name) / MEASURED_FILE
    with session.store.lock("measured", name):
        if not session.store.finished("measured", name):
            model = None if row.recipe is None else quantise(session, row)
            layers, budget = _errors(session, row, model)
            analyses = {} if model is None else _analyses(session, row, model)
            images, metrics = _metrics(session, row)
            found = {"layers": layers, "budget": budget, "images": images, "metrics": metrics}
            found["analyses"] = analyses
            text = json.dumps(
                to_plain(found, where="record"), indent=1, ensure_ascii=False, allow_nan=False
            )
            with session.store.write("measured", name, info) as folder:
                write_bytes(folder / MEASURED_FILE, text.encode())
    loaded: dict[str, Any] = json.loads(path.read_text(), object_hook=decode_float)
    return loaded


def _metrics(session: Session, row: Row) -> tuple[dict[str, Any], dict[str, Any]]:
    with session.timed("metrics"):
        images, config, real = image_set(session.store, row), row.config, None
        if config.data.real is not None:
            real = with_features(real_images(config), config, session.store, row.device)
        entries = metrics.measure(
            config.metrics.names,
            images,
            reference=None if row.recipe is None else reference_set(session.store, row),
            real=real,
            device=row.device,
            extractor=config.metrics.extractor,
            bootstrap=config.metrics.bootstrap,
            workers=config.metrics.workers,
        )
    names, seen = list(images.names), list(images.seen or ())
    return {"hash": images.hash, "names": names, "seen": seen}, entries


def load_record(store: Store, row: Row) -> Record:
    return records.load(store.path("record", row.keys["record"]) / RECORD_FILE)


def image_set(store: Store, row: Row, stage: str = "images") -> Any:
    """The row's images in the order of its prompts."""
    folder = store.path("images", row.keys[stage])
    paths = [generation.image_path(folder, prompt) for prompt in row.prompts]
    return ImageSet.of_prompts(paths, row.prompts)


def reference_set(store: Store, row: Row) -> Any:
    """The 16-bit model's images of the same prompts."""
    return image_set(store, row, "reference")


def _errors(
    session: Session, row: Row, model: QuantizedModel | None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(weight and output error of every layer, what the packed layers cost)."""
    if row.recipe is None or model is None:
        return [], {"bits_per_weight": 16.0, **dict.fromkeys(("nbytes", "rank"))}
    layers, inputs = session.layers(row, row.recipe.skip), rows(session, row, "measure")
    with session.timed("metrics"):
        errors = layer_errors(model, session.pipe(row, text=False).transformer, layers, inputs)
        if row.recipe.allocation.kind != "uniform":
            for entry in errors:
                tensors = model.layers[entry["layer"]]
                entry["rank"] = 0 if tensors.left is None else tensors.left.shape[-1]
                entry["bits"] = tensors.weight.format.bits
    return errors, {
        "bits_per_weight": model.bits_per_weight,
        "branch_bits_per_weight": model.branch_bits_per_weight,
        "nbytes": model.nbytes,
        "rank": _rank(model) if row.recipe.branch.kind != "none" else None,
    }


def _analyses(session: Session, row: Row, model: QuantizedModel) -> dict[str, Any]:
    """What `metrics.analyses` asks for beside the metrics."""
    asked, transformer = row.config.metrics.analyses, session.pipe(row, text=False).transformer
    found: dict[str, Any] = {}
    if "limits" in asked:
        weights = {name: weight_matrix(transformer.get_submodule(name)) for name in model.layers}
        found["limits"] = mean_limits(weights, model.bits_per_weight)
    if "steps" in asked:
        assert row.recipe is not None
        layers = session.layers(row, row.recipe.skip)
        with session.timed("model forward"):
            found["steps"] = errors_by_role(transformer, model, layers, forwards(session, row))
    if "losses" in asked:
        found["losses"] = {name: notes["losses"] for name, notes in model.info.items()}
        found["seconds"] = {name: notes["seconds"] for name, notes in model.info.items()}
    return found


def _rank(model: QuantizedModel) -> int | str:
    """The rank, or the range of ranks where they were given out."""
    ranks = model.ranks
    return ranks[0] if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}"


def _timings(store: Store, row: Row) -> dict[str, float]:
    """Seconds that each of the row's products took, over all attempts."""
    found = {}
    for stage in (*ACTIVATIONS, "quantised", "images"):
        manifest = store.manifest(stage.split(":")[0], row.keys.get(stage, "none"))
        if manifest is not None:
            found[stage] = float(manifest["info"]["seconds"])
    return found


def _portable(config: Config) -> dict[str, Any]:
    """The config without what names a place on this machine."""
    plain = to_plain(config)
    plain.pop("output")
    path = config.model.path
    if path is not None and not path.startswith("asset:"):
        plain["model"]["path"] = Path(path).name
    if config.quant is not None and is_own_file(config.quant.branch.kind):
        plain["quant"]["branch"]["kind"] = label(config.quant.branch.kind)
    return plain
