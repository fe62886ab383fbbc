"""The stages after the activations: quantise, generate, measure. `run.py` orders them.

Every stage takes its product's lock, looks
again whether it is there, and writes it aside before it counts as finished.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraq import generate as generation
from loraq import record as records
from loraq.activations import activations, rows
from loraq.config import Config
from loraq.door import to_plain
from loraq.errors import LoraqError
from loraq.estimate import stage_kind
from loraq.models import Layer
from loraq.models.loading import resolve_asset
from loraq.plan import ACTIVATIONS, Row
from loraq.prompts import Prompt
from loraq.record import Record
from loraq.store import Store
from loraq.workshop import Workshop

if TYPE_CHECKING:
    from loraq.quantizer import QuantizedModel

RECORD_FILE = "record.json"


def quantise(work: Workshop, row: Row) -> QuantizedModel:
    """The row's packed layers: made group by group, or read where they are finished."""
    from loraq.quantizer import quantize_model

    assert row.recipe is not None
    name, recipe = row.keys["quantised"], row.recipe
    pipe, layers = work.pipe(row), work.layers(row, row.recipe.skip)
    with work.store.lock("quantised", name):
        if work.store.finished("quantised", name):
            with work.timed("read packed layers"):
                return read_packed(work.store.path("quantised", name), layers)
        read = activations(work, row)
        info: dict[str, Any] = {"kind": stage_kind(row, "quantised"), "units": 1}
        with (
            work.timed("quantise"),
            work.store.write("quantised", name, info, resume=True) as folder,
        ):
            bar = work.bar("quantise")
            model = quantize_model(pipe.transformer, layers, recipe, read, folder, bar)
            info["seconds"] = sum(group.get("seconds", 0.0) for group in model.info.values())
            return model


def read_packed(folder: Path, layers: Sequence[Layer]) -> QuantizedModel:
    """A finished product's packed layers; its files were checked against their checksums."""
    from loraq.checkpoint import load_group
    from loraq.quantizer import QuantizedModel

    found, info = {}, {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors, info[path.stem] = load_group(path)
        found.update(tensors)
    return QuantizedModel({layer.name: found[layer.name] for layer in layers}, info)


def generate(work: Workshop, row: Row) -> None:
    """The row's images, batch by batch."""
    name = row.keys["images"]
    info: dict[str, Any] = {"kind": stage_kind(row, "images"), "units": len(row.prompts)}
    model = None if row.recipe is None else quantise(work, row)
    pipe = work.pipe(row)
    with work.store.lock("images", name):
        if work.store.finished("images", name):
            return
        with (
            work.timed("model forward"),
            work.store.write("images", name, info, resume=True) as folder,
            _applied(model, pipe.transformer),
        ):
            bar = work.bar("images")
            config = row.config
            generation.generate(pipe, config.model, row.prompts, config.generate, folder, bar)
            info["seconds"] = generation.generation_seconds(folder)


def measure(work: Workshop, row: Row) -> Record:
    """Errors per layer, metrics of the images, and the record of both."""
    from loraq import metrics

    name = row.keys["record"]
    info = {"kind": stage_kind(row, "record"), "units": 1}
    with work.store.lock("record", name):
        if work.store.finished("record", name):
            return load_record(work.store, row)
        layers, budget = _errors(work, row)
        with work.timed("metrics"):
            images, config = image_set(work.store, row), row.config
            entries = metrics.measure(
                config.metrics.names,
                images,
                reference=None if row.recipe is None else reference_set(work.store, row),
                real=real_images(row) if config.data.real is not None else None,
                device=row.device,
                extractor=config.metrics.extractor,
                bootstrap=config.metrics.bootstrap,
            )
        made = Record(
            key=name,
            experiment=config.experiment,
            row=row.name,
            label=row.label,
            config=_portable(config),
            model_hash=row.model_hash,
            budget=budget,
            layers=layers,
            images={
                "hash": images.hash,
                "names": list(images.names),
                "seen": list(images.seen or ()),
            },
            metrics=entries,
            timings=_timings(work.store, row),
            **records.origin(row.device),
        )
        with work.store.write("record", name, info) as folder:
            records.save(made, folder / RECORD_FILE)
        return load_record(work.store, row)


def load_record(store: Store, row: Row) -> Record:
    return records.load(store.path("record", row.keys["record"]) / RECORD_FILE)


def image_set(store: Store, row: Row, stage: str = "images") -> Any:
    """The row's images in the order of its prompts."""
    from loraq.metrics import ImageSet

    folder = store.path("images", row.keys[stage])
    paths = [generation.image_path(folder, prompt) for prompt in row.prompts]
    return ImageSet.of_prompts(paths, row.prompts)


def reference_set(store: Store, row: Row) -> Any:
    """The 16-bit model's images of the same prompts."""
    return image_set(store, row, "reference")


def real_images(row: Row) -> Any:
    """The real images of the row's prompts: from a folder, or a file of their features."""
    from loraq.metrics import ImageSet
    from loraq.metrics.features import load_features

    assert row.config.data.real is not None
    path = resolve_asset(row.config.data.real)
    if path.is_dir():
        return ImageSet.of_folder(path, [prompt.name for prompt in row.prompts])
    if not path.is_file():
        raise LoraqError(
            f"data.real={row.config.data.real}: there is no such folder or features file. Give "
            "one, or set data.real=null metrics=paired to leave these metrics out."
        )
    return load_features(path, [prompt.name for prompt in _whole_split(row.config)])


def _whole_split(config: Config) -> Sequence[Prompt]:
    from loraq.prompts import data_prompts

    return data_prompts(dataclasses.replace(config.data, count=None))


def _errors(work: Workshop, row: Row) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(weight and output error of every layer, what the packed layers cost)."""
    if row.recipe is None:
        return [], {"bits_per_weight": 16.0, **dict.fromkeys(("nbytes", "rank"))}
    from loraq.quantizer import layer_errors

    model = quantise(work, row)
    layers, inputs = work.layers(row, row.recipe.skip), rows(work, row, "measure")
    with work.timed("metrics"):
        errors = layer_errors(model, work.pipe(row).transformer, layers, inputs)
    return errors, {
        "bits_per_weight": model.bits_per_weight,
        "branch_bits_per_weight": model.branch_bits_per_weight,
        "nbytes": model.nbytes,
        "rank": _rank(model) if row.recipe.branch.kind != "none" else None,
    }


def _rank(model: QuantizedModel) -> int | str:
    """The rank, or the range of ranks where they were given out."""
    ranks = model.ranks
    return ranks[0] if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}"


@contextlib.contextmanager
def _applied(model: QuantizedModel | None, transformer: Any) -> Iterator[None]:
    if model is None:
        yield
        return
    model.apply(transformer)
    try:
        yield
    finally:
        model.revert(transformer)


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
    return plain
