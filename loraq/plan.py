"""What every row's products are called, which are there, which are to be made, and early checks.

A product's key is the hash of exactly what it depends on: resolved settings, the weights' hash,
the stage's version, and what matters of the environment. Everything here works from configs, files
and manifests; no model is loaded.

    inputs     activations of the 16-bit model (for calibrated methods, and for output errors);
               moments and sensitivity likewise (activations.py)
    quantised  packed layers
    images     PNGs; the reference row's serve every other row of the same prompts
    measured   errors and metrics, without the row's names
    record     what was measured, with names, settings, timings and origin
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraq import arithmetic, generate
from loraq.config import Config, ModelConfig, Recipe
from loraq.errors import LoraqError
from loraq.models import weights_hash
from loraq.models.loading import resolve_asset
from loraq.prompts import Prompt, calibration_prompts, data_prompts
from loraq.store import Store, file_hash, key

INPUTS_VERSION = 1
RECORD_VERSION = 1
ACTIVATIONS = ("inputs:calibrate", "moments", "sensitivity", "inputs:measure")
"""Products of the 16-bit model's activations, in the order in which they are made."""
SENSITIVITY_PROMPTS, SENSITIVITY_STEPS = 8, 4


@dataclass(frozen=True)
class Row:
    """One row with the keys of its products and the prompts that they read."""

    config: Config
    model_hash: str
    device: str
    threads: int
    prompts: Sequence[Prompt]
    calibration: Sequence[Prompt]
    measuring: Sequence[Prompt]
    keys: dict[str, str] = field(default_factory=dict)
    todo: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        return self.config.row or self.config.method

    @property
    def label(self) -> str:
        return self.config.label or self.name

    @property
    def recipe(self) -> Recipe | None:
        return self.config.quant


def make_plan(configs: Sequence[Config], store: Store, last: str = "record") -> list[Row]:
    """The rows with their keys, and for each what is still to be made, up to the stage `last`.

    Every product that is there is read and compared with its checksums; a damaged one is reported
    and set aside by the store, and planned anew.
    """
    arithmetic.settle()
    rows = [_keyed(config) for config in configs]
    state: dict[tuple[str, str], bool] = {}

    def finished(stage: str, row: Row) -> bool:
        product = (stage.split(":")[0], row.keys[stage])
        if product not in state:
            state[product] = store.finished(*product)
        return state[product]

    planned = []
    for row in rows:
        there = {stage: finished(stage, row) for stage in row.keys if stage != "reference"}
        damaged = {s for s in there if (s.split(":")[0], row.keys[s]) in store.corrupted}
        ends = {"record": ("images", "record"), "images": ("images",)}.get(last, ())
        todo = {stage for stage in ends if not there[stage]} | damaged
        if "record" in todo and not there["measured"]:
            todo.add("measured")
        if row.recipe is not None:
            if not there["quantised"] and (todo & {"images", "measured"} or last == "quantised"):
                todo.add("quantised")
            if not there["inputs:measure"] and "measured" in todo:
                todo.add("inputs:measure")
            if "quantised" in todo:
                read = (stage for stage in ACTIVATIONS[:-1] if stage in row.keys)
                todo |= {stage for stage in read if not there[stage]}
        planned.append(dataclasses.replace(row, todo=frozenset(todo)))
    return planned


def _keyed(config: Config) -> Row:
    """A row's keys, each from exactly what the product depends on."""
    device, threads = _device(config), _threads(config)
    model_hash = weights_hash(config.model)
    prompts = data_prompts(config.data)
    calibration, measuring = calibration_prompts(config.data, config.calibration, config.model)
    row = Row(config, model_hash, device, threads, prompts, calibration, measuring)

    machine = {
        "device": device,
        "torch": importlib.metadata.version("torch"),
        "row_invariant": arithmetic.row_invariant(),
    }
    sampler = {
        "weights": model_hash,
        "model": {
            entry.name: getattr(config.model, entry.name)
            for entry in dataclasses.fields(ModelConfig)
            if entry.name not in ("name", "path", "hub_id")
        },
        "diffusers": importlib.metadata.version("diffusers"),
        "transformers": importlib.metadata.version("transformers"),
        "batch_size": config.generate.batch_size,
        "threads": threads,
        **machine,
    }
    drawing = {
        "version": INPUTS_VERSION,
        "rows": config.calibration.rows_per_layer,
        "seed": config.calibration.seed,
        **sampler,
    }
    reference = key("images", generate.VERSION, sampler, config.generate.seed, prompts, None)
    keys = {"images": reference, "reference": reference}
    if config.quant is not None:
        from loraq.quantizer import BRANCH_VERSIONS, VERSION

        keys["inputs:measure"] = key("inputs", drawing, measuring)
        keys |= _calibration_keys(config.quant, drawing, calibration)
        read = [keys.get(stage) for stage in ACTIVATIONS[:-1] if stage in keys]
        kind = config.quant.branch.kind
        keys["quantised"] = key(
            *("quantised", VERSION, config.quant.identity(), model_hash, config.model.family),
            *(config.model.dtype, machine, *(read or [None])),
            *([BRANCH_VERSIONS[kind]] if kind in BRANCH_VERSIONS else []),
        )
        keys["images"] = key(
            *("images", generate.VERSION, sampler, config.generate.seed, prompts),
            keys["quantised"],
        )
    judging = _judging(config)
    record = key("record", RECORD_VERSION, keys, judging, _named(config))
    keys["measured"] = key("measured", RECORD_VERSION, keys, judging)
    keys["record"] = record
    return dataclasses.replace(row, keys=keys)


def _calibration_keys(
    recipe: Recipe, drawing: dict[str, Any], calibration: Sequence[Prompt]
) -> dict[str, str]:
    """Keys of the activations that the recipe reads; none for a data-free one."""
    keys = {}
    if recipe.needs_rows:
        keys["inputs:calibrate"] = key("inputs", drawing, calibration)
    if recipe.needs_moments:
        keys["moments"] = key("moments", drawing, calibration)
    if recipe.needs_sensitivity:
        perturbing = [recipe.identity()[operand] for operand in ("weight", "activation")]
        keys["sensitivity"] = key(
            *("sensitivity", drawing, calibration[:SENSITIVITY_PROMPTS], SENSITIVITY_STEPS),
            *(perturbing, recipe.skip, recipe.branch.share_qkv),
        )
    return keys


def _judging(config: Config) -> dict[str, Any]:
    """What the metrics of a record depend on."""
    from loraq.metrics import module
    from loraq.metrics.features import choose

    real: Any = config.data.real
    extractor = config.metrics.extractor
    if real is not None:
        path = resolve_asset(real)
        if path.is_file():  # features: the file itself says which extractor made them
            real = file_hash(path)
        else:  # images, whatever their folder is called; `auto` depends on what weights are there
            real = {image.name: file_hash(image) for image in sorted(path.glob("*.png"))}
            extractor = choose(extractor)
    judged = {
        "metrics": [(name, module(name).VERSION) for name in config.metrics.names],
        "extractor": extractor,
        "bootstrap": config.metrics.bootstrap,
        "real": real,
    }
    if config.metrics.analyses:
        judged["analyses"] = sorted(config.metrics.analyses)
    return judged


def _named(config: Config) -> list[Any]:
    return [config.experiment, config.row, config.label, config.method]


def _device(config: Config) -> str:
    if config.device == "cpu":
        return "cpu"
    import torch

    there = torch.cuda.is_available()
    if there:  # torchrun and accelerate launch number a machine's processes
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if config.device == "cuda" and not there:
        raise LoraqError("device=cuda: PyTorch finds no CUDA device here. Set device=cpu or auto.")
    return "cuda" if there else "cpu"


def _threads(config: Config) -> int:
    import torch

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    return torch.get_num_threads()


def check(rows: Sequence[Row]) -> None:
    """Everything that would fail later and can be known now: metrics, real images, layers, rank."""
    from loraq import metrics
    from loraq.measuring import real_images

    for row in rows:
        if "measured" in row.todo:
            names = row.config.metrics.names
            needing = [name for name in names if metrics.module(name).NEEDS == "real"]
            if needing and row.config.data.real is None:
                raise LoraqError(
                    f"metrics.names: {', '.join(needing)} compare with real images, and data.real "
                    "is null. Set data.real=FOLDER or leave them out (metrics=paired)."
                )
            options = {"extractor": row.config.metrics.extractor, "device": row.device}
            metrics.check(names, real_images(row.config) if needing else None, **options)
    made = [row for row in rows if "quantised" in row.todo]
    if not made:
        return
    from loraq.models.families import list_layers
    from loraq.models.loading import meta_transformer
    from loraq.quantizer import planned_branch_bits

    transformer = meta_transformer(made[0].config.model)
    for row in made:
        assert row.recipe is not None
        try:
            layers = list_layers(transformer, row.config.model.family, row.recipe.skip)
            planned_branch_bits(layers, row.recipe)
        except LoraqError as error:
            raise LoraqError(f"{error}\n  (in row '{row.name}')") from None


def result_folder(rows: Sequence[Row], overrides: Sequence[str]) -> Path:
    """Where an experiment's table and picture go; changed settings have a folder of their own."""
    config = rows[0].config
    neutral = ("experiment=", "output=", "device=", "threads=", "tracking")
    changed = sorted(o for o in overrides if not o.startswith(neutral))
    ending = f"-{key(changed)[:6]}" if changed else ""
    return Path(config.output) / "results" / f"{config.experiment}{ending}"
