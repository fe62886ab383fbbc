"""The stages that make products: calibrate, quantise, generate, measure. `run.py` orders them.

A `Workshop` holds what they share: the store and the pipeline, which is loaded when the first
stage needs it and never when everything is cached. Every stage takes its product's lock, looks
again whether it is there, and writes it aside before it counts as finished.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraq import generate as generation
from loraq import record as records
from loraq.config import Config, Recipe
from loraq.door import to_plain
from loraq.errors import LoraqError
from loraq.estimate import stage_kind
from loraq.models import Layer, list_layers, load_pipeline
from loraq.models.loading import resolve_asset
from loraq.plan import Row
from loraq.prompts import Prompt
from loraq.record import Record
from loraq.store import Store, disk_error

if TYPE_CHECKING:
    from torch import Tensor

    from loraq.quantizer import QuantizedModel

INPUTS_FILE = "inputs.safetensors"
RECORD_FILE = "record.json"


class Workshop:
    """The store, the loaded pipeline, and how long each kind of work took in this process."""

    def __init__(self, store: Store, progress: bool = True) -> None:
        self.store = store
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self._loaded: tuple[Any, Any] | None = None

    def pipe(self, row: Row) -> Any:
        """The row's pipeline; the last one is kept."""
        wanted = (row.model_hash, row.config.model, row.device)
        if self._loaded is None or self._loaded[0] != wanted:
            self._loaded = None
            with self.timed("load the model"):
                self._loaded = (wanted, load_pipeline(row.config.model, row.device))
        return self._loaded[1]

    def layers(self, row: Row, skip: Sequence[str] | None) -> list[Layer]:
        return list_layers(self.pipe(row).transformer, row.config.model.family, skip)

    def bar(self, text: str) -> str | None:
        return f"  {text}" if self.progress else None

    @contextlib.contextmanager
    def timed(self, work: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            self.seconds[work] = self.seconds.get(work, 0.0) + spent


def calibrate(work: Workshop, row: Row, use: str) -> None:
    """Activations of the 16-bit model, for methods to read (`calibrate`) or errors (`measure`)."""
    from safetensors.torch import save_file

    from loraq.capture import InputCapture

    stage, name = f"inputs:{use}", row.keys[f"inputs:{use}"]
    prompts = row.calibration if use == "calibrate" else row.measuring
    info = {"kind": stage_kind(row, stage), "units": len(prompts)}
    with work.store.lock("inputs", name):
        if work.store.finished("inputs", name):
            return
        pipe, model, settings = work.pipe(row), row.config.model, row.config.calibration
        layers = work.layers(row, skip=())
        size = row.config.generate.batch_size
        batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        forwards = len(batches) * model.steps
        with work.store.write("inputs", name, info) as folder, work.timed("model forward"):
            rows_kept, seed = settings.rows_per_layer, settings.seed
            with InputCapture(pipe.transformer, layers, rows_kept, forwards, seed) as capture:
                for batch in _bar(work, batches, f"activations to {use}", "batch"):
                    generation.image_batch(pipe, model, batch, seed, output_type="latent")
            path = folder / INPUTS_FILE
            with _disk(path):
                save_file(capture.inputs(), path)


def quantise(work: Workshop, row: Row) -> QuantizedModel:
    """The row's packed layers: made group by group, or read where they are finished."""
    from loraq.quantizer import quantize_model

    assert row.recipe is not None
    name, recipe = row.keys["quantised"], row.recipe
    pipe, layers = work.pipe(row), work.layers(row, row.recipe.skip)
    with work.store.lock("quantised", name):
        if work.store.finished("quantised", name):
            with work.timed("read packed layers"):
                return read_packed(work.store.path("quantised", name), layers, recipe)
        inputs = _inputs(work, row, "calibrate") if recipe.needs_calibration else None
        info: dict[str, Any] = {"kind": stage_kind(row, "quantised"), "units": 1}
        with (
            work.timed("quantise"),
            work.store.write("quantised", name, info, resume=True) as folder,
        ):
            bar = work.bar("quantise")
            model = quantize_model(pipe.transformer, layers, recipe, inputs, folder, bar)
            info["seconds"] = sum(group.get("seconds", 0.0) for group in model.info.values())
            return model


def read_packed(folder: Path, layers: Sequence[Layer], recipe: Recipe) -> QuantizedModel:
    """A finished product's packed layers; its files were checked against their checksums."""
    from loraq.checkpoint import load_group
    from loraq.quantizer import QuantizedModel, planned_branch_bits

    found, info = {}, {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors, info[path.stem] = load_group(path)
        found.update(tensors)
    rank, _ = planned_branch_bits(layers, recipe)
    return QuantizedModel({layer.name: found[layer.name] for layer in layers}, rank, info)


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
    layers, inputs = work.layers(row, row.recipe.skip), _inputs(work, row, "measure")
    with work.timed("metrics"):
        errors = layer_errors(model, work.pipe(row).transformer, layers, inputs)
    return errors, {
        "bits_per_weight": model.bits_per_weight,
        "branch_bits_per_weight": model.branch_bits_per_weight,
        "nbytes": model.nbytes,
        "rank": model.rank if row.recipe.branch.kind != "none" else None,
    }


def _inputs(work: Workshop, row: Row, use: str) -> dict[str, Tensor]:
    """Captured activations; made here where the plan did not foresee that they are needed."""
    from safetensors.torch import load_file

    name = row.keys[f"inputs:{use}"]
    path = work.store.path("inputs", name) / INPUTS_FILE
    if not path.is_file():
        calibrate(work, row, use)
    return load_file(path, device=row.device)


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
    for stage in ("inputs:calibrate", "inputs:measure", "quantised", "images"):
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


def _bar(work: Workshop, items: Sequence[Any], text: str, unit: str) -> Any:
    from tqdm import tqdm

    return tqdm(items, desc=work.bar(text), unit=unit, disable=not work.progress, leave=False)


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    """safetensors reports a full disk as its own error; here it is ours."""
    try:
        yield
    except Exception as error:
        if "No space left" in str(error):
            raise disk_error(OSError(28, str(error)), path) from error
        raise
