"""One step of PixArt-Σ and SANA-1.6B on GPUs that are not there: a cost model, no measurement.

    python -m experiments.bench.roofline [--output FILE.json]

Counts operations, bytes and launches of the real transformer classes and packed layers on meta
tensors (`loraq/utils/work.py`), in the published configurations, 16 images at 1024 px with
guidance. Every kernel takes the longest of its launch, its arithmetic and its traffic, at the rates
of `loraq/utils/rates.py`, and kernels follow each other without a gap. Not modelled: caches, tails,
overlap, the host, quantisers other than those of the way. "Fused" is the emulation as it runs on a
GPU (`loraq/layers/stacked.py`): one kernel transforms and quantises. The phases of `table1` on one
H100 are those that `--dry-run` states (`loraq/runner/forecast.py`), for the published repositories
without their weights.

Expected time: two minutes on one core. Outcome: results/bench/roofline.json, docs/gpu.md.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from loraq import recipe
from loraq.compose import load_rows
from loraq.data import Prompt
from loraq.quantization.planned import Step, StepShape, step_work
from loraq.results import record
from loraq.runner.forecast import forecast
from loraq.runner.rows import Row, Stage
from loraq.utils.rates import DEVICES
from loraq.utils.work import Work

from .forward import FAMILIES, TEXT_TOKENS
from .hub_layout import write_layout
from .make_fullsize import CONFIGS, meta_model

IMAGES = 16
WAYS = {
    "16-bit": None,
    "RTN": ["rtn", "quant.transform.shift=true"],
    "SVDQuant": ["svdquant"],
    "LoRaQ O2": ["loraq_o2", "quant.transform.shift=true"],
    "loraq_best": ["loraq_best"],
}


def step_of(model: str, way: str, fused: bool = False, images: int = IMAGES) -> Step:
    """One step of a full-size model with guidance."""
    side, blocks = CONFIGS[model]["sample_size"], CONFIGS[model]["num_layers"]
    shape = StepShape(2 * images, side, TEXT_TOKENS, torch.bfloat16)
    chosen = WAYS[way]
    made = None if chosen is None else recipe(*chosen)
    build = functools.partial(meta_model, model)
    return step_work(build, blocks, FAMILIES[model], shape, made, fused)


def row_of(model: str, way: str, fused: bool) -> dict[str, Any]:
    """One row of the record."""
    step = step_of(model, way, fused)
    work = step.work
    return {
        "model": model,
        "way": way,
        "quantisers": "–" if WAYS[way] is None else "fused" if fused else "emulated",
        "launches": work.launches,
        "flops": work.flops,
        "bytes": work.bytes,
        "peak_bytes": step.peak,
        "seconds": {name: work.seconds(rates) for name, rates in DEVICES.items()},
        "kinds": seconds_by_kind(work),
    }


def seconds_by_kind(work: Work) -> dict[str, float]:
    """Seconds on an H100 in products, attention and passes over activations."""
    found = {"products": 0.0, "attention": 0.0, "passes": 0.0}
    for kernel, count in work.kernels.items():
        kind = "products" if kernel.flops else "passes"
        kind = "attention" if kernel.name == "attention" else kind
        found[kind] += count * kernel.seconds(DEVICES["H100"])
    return found


def hub_rows(model: str, folder: Path, *overrides: str, prompts: int = 128) -> list[Row]:
    """The rows that `overrides` compose for a layout of `write_layout`, on a GPU, unplanned."""
    where = ["model.hub_id=null", f"model.path={folder}"]
    configs = load_rows([*overrides, f"model={model}", *where])
    names = [Prompt(f"p{number}", "a prompt") for number in range(prompts)]
    return [Row(config, "", "cuda", 1, names, names[:32], names[:16]) for config in configs]


def phases_of(model: str) -> dict[str, dict[str, float]]:
    """Stage → seconds and bytes of `table1` on one H100; a shared product counts once."""
    found: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as place:
        write_layout(model, Path(place) / "model")
        rows = hub_rows(model, Path(place) / "model", "experiment=table1")
        for number, row in enumerate(rows):
            stages = [Stage.IMAGES, Stage.MEASURED]
            if number == 0:
                stages += [Stage.EMBEDDINGS, Stage.MEASURING_INPUTS, Stage.CALIBRATION_INPUTS]
            if row.recipe is not None:
                stages += [Stage.QUANTIZED]
            for stage in stages:
                seconds, size = forecast(row, stage, DEVICES["H100"])
                found.setdefault(stage, Counter()).update(seconds=seconds, bytes=size)
    return {stage: dict(counts) for stage, counts in found.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    rows = []
    for model in CONFIGS:
        for way, chosen in WAYS.items():
            for fused in (False,) if chosen is None else (False, True):
                rows.append(row_of(model, way, fused))
                row = rows[-1]
                print(
                    f"{model:13} {way:10} {row['quantisers']:9} {row['launches']:6} launches, "
                    f"{row['bytes'] / 1e12:.2f} TB, {row['flops'] / 1e12:.0f} TFLOP, "
                    f"{row['seconds']['H100']:.2f} s on an H100",
                    flush=True,
                )
    if options.output is not None:
        assumed = {name: asdict(rates) for name, rates in DEVICES.items()}
        settings = {"images": IMAGES, "text_tokens": TEXT_TOKENS, "rates": assumed, "ways": WAYS}
        phases = {model: phases_of(model) for model in CONFIGS}
        found = {"settings": settings, "rows": rows, "table1": phases}
        record.save_findings(found, options.output)


if __name__ == "__main__":
    main()
