"""Which recipes which layouts of other programs hold, at what cost, and why they refuse the rest.

    python -m experiments.bench.engines [--model FOLDER] [--output FILE.json]

Quantises the first block of a PixArt pipeline by each recipe, and exports it to every target
(`loraq export --list`). Outputs of layers as the engine computes them are compared with those of
packed layers, on random inputs.

Expected time: a minute on 2 cores.
Outcome: results/bench/engines.json, docs/engines.md.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

import loraq
from loraq.errors import LoraqError
from loraq.layouts.targets import targets
from loraq.results import record
from loraq.utils.assets import ASSETS

BRANCH = ("quant.branch.rank=16", "quant.branch.steps=2")
"""Few steps: what a layout holds does not depend on how good the branch is."""
NVFP4 = (
    *("format@quant.weight=nvfp4", "format@quant.activation=nvfp4"),
    "quant.activation.tensor_scale=fixed",
)
MXFP4 = ("format@quant.weight=mxfp4_e2m1", "format@quant.activation=mxfp4_e2m1")
MXFP8 = ("format@quant.weight=mxfp8_e4m3", "format@quant.activation=mxfp8_e4m3")
CHANNELS = ("quant.weight.block=channel", "quant.activation.block=token")
REGULAR = ("quant.transform.hadamard=64", "quant.transform.signs=regular")
RECIPES = {
    "rtn": ("rtn",),
    "svdquant": ("svdquant", *BRANCH, "quant.transform.smooth=fixed"),
    "loraq_o2": ("loraq_o2", *BRANCH),
    "loraq_best": ("loraq_best", *BRANCH),
    "loraq_export": ("loraq_export", *BRANCH),
    "rtn, NVFP4": ("rtn", *NVFP4),
    "loraq_export, NVFP4": ("loraq_export", *BRANCH, *NVFP4),
    "loraq_export, MXFP4": ("loraq_export", *BRANCH, *MXFP4),
    "rtn, MXFP8": ("rtn", *MXFP8),
    "hadamard, regular, INT4 channels": ("hadamard", *CHANNELS, *REGULAR),
}
BFLOAT16 = {"vllm-omni": "bfloat16"}
"""Targets whose readers have no float16, the type of the others here."""
PROMPTS = ["a red cat", "a green fish"]
CALL = {"num_inference_steps": 2, "use_resolution_binning": False, "clean_caption": False}


def exported(transformer: Any, target: str) -> dict[str, Any]:
    """The losses and differences of one export, or why it is refused."""
    given: dict[str, Any] = {"dtype": BFLOAT16.get(target), "progress": False}
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = loraq.export(transformer, Path(folder) / "out", target, **given)
        except LoraqError as error:
            return {"refused": str(error)}
    differences = list(found.layers.values())
    middle, largest = statistics.median(differences), max(differences)
    sizes = {"median": middle, "largest": largest, "bytes": found.size}
    return {"losses": list(found.losses), **sizes}


def one_block(folder: Path) -> Any:
    """The pipeline with the first of its blocks alone."""
    pipe: Any = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.transformer_blocks = pipe.transformer.transformer_blocks[:1]
    pipe.transformer.register_to_config(num_layers=1)
    return pipe


def recipe_row(pipe: Any, name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """One recipe in every layout."""
    recipe, started = loraq.recipe(*overrides), time.perf_counter()
    prompts = {"prompts": PROMPTS, "call": CALL} if recipe.needs_calibration else {}
    model = loraq.quantize(pipe, recipe, rows_per_layer=256, progress=False, **prompts)
    made = {target: exported(pipe.transformer, target) for target in targets()}
    model.revert(pipe)
    held = [target for target, one in made.items() if "refused" not in one]
    print(
        f"{name}: {', '.join(held) or 'none'} ({time.perf_counter() - started:.0f} s)", flush=True
    )
    return {"name": name, "overrides": list(overrides), "targets": made}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=ASSETS / "tiny_pixart", metavar="FOLDER")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    logging.getLogger("loraq").setLevel(logging.ERROR)  # losses are in the record
    pipe = one_block(options.model)
    rows = [recipe_row(pipe, name, given) for name, given in RECIPES.items()]
    if options.output is not None:
        described = {name: target.description for name, target in targets().items()}
        settings = {"model": options.model.name, "targets": described}
        record.save_findings({"settings": settings, "rows": rows}, options.output)


if __name__ == "__main__":
    main()
