"""The last stage: errors per layer, metrics of the images, and the record of both.

What was measured is a product of its own, without the row's names: a row that several experiments
share is measured once, and each experiment's record is written from it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraq import generate as generation
from loraq.activations import forwards, rows
from loraq.config import Config
from loraq.estimate import stage_kind
from loraq.keys import ACTIVATIONS, Row
from loraq.real_images import real_images, with_features
from loraq.results import record as records
from loraq.results.record import Record
from loraq.stages import quantise
from loraq.store import Store
from loraq.utils.files import write_bytes
from loraq.utils.plain import decode_float, to_plain
from loraq.utils.user_module import is_own_file, label
from loraq.workshop import Workshop

if TYPE_CHECKING:
    from loraq.quantization.model import QuantizedModel

MEASURED_FILE = "measured.json"
RECORD_FILE = "record.json"


def measure(work: Workshop, row: Row) -> Record:
    """The row's record: what was measured, with its names, timings and origin."""
    name = row.keys["record"]
    info = {"kind": stage_kind(row, "record"), "units": 1}
    with work.store.lock("record", name):
        if work.store.finished("record", name):
            return load_record(work.store, row)
        found = _measured(work, row)
        made = Record(
            key=name,
            experiment=row.config.experiment,
            row=row.name,
            label=row.label,
            config=_portable(row.config),
            model_hash=row.model_hash,
            timings=_timings(work.store, row),
            **found,
            **records.origin(row.device),
        )
        with work.store.write("record", name, info) as folder:
            records.save(made, folder / RECORD_FILE)
        return load_record(work.store, row)


def _measured(work: Workshop, row: Row) -> dict[str, Any]:
    """budget, layers, images, metrics, analyses: read where they are there, else measured."""
    name = row.keys["measured"]
    info = {"kind": stage_kind(row, "measured"), "units": 1}
    path = work.store.path("measured", name) / MEASURED_FILE
    with work.store.lock("measured", name):
        if not work.store.finished("measured", name):
            model = None if row.recipe is None else quantise(work, row)
            layers, budget = _errors(work, row, model)
            analyses = {} if model is None else _analyses(work, row, model)
            images, metrics = _metrics(work, row)
            found = {"layers": layers, "budget": budget, "images": images, "metrics": metrics}
            found["analyses"] = analyses
            text = json.dumps(
                to_plain(found, where="record"), indent=1, ensure_ascii=False, allow_nan=False
            )
            with work.store.write("measured", name, info) as folder:
                write_bytes(folder / MEASURED_FILE, text.encode())
    loaded: dict[str, Any] = json.loads(path.read_text(), object_hook=decode_float)
    return loaded


def _metrics(work: Workshop, row: Row) -> tuple[dict[str, Any], dict[str, Any]]:
    from loraq import metrics

    with work.timed("metrics"):
        images, config, real = image_set(work.store, row), row.config, None
        if config.data.real is not None:
            real = with_features(real_images(config), config, work.store, row.device)
        entries = metrics.measure(
            config.metrics.names,
            images,
            reference=None if row.recipe is None else reference_set(work.store, row),
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
    from loraq.metrics.common.image_set import ImageSet

    folder = store.path("images", row.keys[stage])
    paths = [generation.image_path(folder, prompt) for prompt in row.prompts]
    return ImageSet.of_prompts(paths, row.prompts)


def reference_set(store: Store, row: Row) -> Any:
    """The 16-bit model's images of the same prompts."""
    return image_set(store, row, "reference")


def _errors(
    work: Workshop, row: Row, model: QuantizedModel | None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(weight and output error of every layer, what the packed layers cost)."""
    if row.recipe is None or model is None:
        return [], {"bits_per_weight": 16.0, **dict.fromkeys(("nbytes", "rank"))}
    from loraq.quantization.layer_errors import layer_errors

    layers, inputs = work.layers(row, row.recipe.skip), rows(work, row, "measure")
    with work.timed("metrics"):
        errors = layer_errors(model, work.pipe(row, text=False).transformer, layers, inputs)
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


def _analyses(work: Workshop, row: Row, model: QuantizedModel) -> dict[str, Any]:
    """What `metrics.analyses` asks for beside the metrics."""
    asked, transformer = row.config.metrics.analyses, work.pipe(row, text=False).transformer
    found: dict[str, Any] = {}
    if "limits" in asked:
        from loraq.models.pointwise import weight_matrix
        from loraq.quantization.rate_distortion import limits

        weights = {name: weight_matrix(transformer.get_submodule(name)) for name in model.layers}
        found["limits"] = limits(weights, model.bits_per_weight)
    if "steps" in asked:
        from loraq.replay import errors_by_role

        assert row.recipe is not None
        layers = work.layers(row, row.recipe.skip)
        with work.timed("model forward"):
            found["steps"] = errors_by_role(transformer, model, layers, forwards(work, row))
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
