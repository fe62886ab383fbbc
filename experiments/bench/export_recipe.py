"""Which data-free parts a recipe for SVDQuant's readers gains from: its layers' output errors.

    python -m experiments.bench.export_recipe [--blocks 1 4] [--output FILE.json]

These readers do not rotate, do not shift and keep the branch in 16 bits, an R for each layer.
Recipes without what they cannot do quantise blocks of tiny_pixart, beside `loraq_best`, which no
such reader can hold. Reports the mean output error on inputs of the development captions, which no
recipe reads, and the bits per weight. Images are not made.

Expected time: some minutes on one core (not measured alone).
Outcome: results/bench/export_recipe.json, docs/method.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch

from experiments.bench.saved_rows import SavedRows
from loraq import recipe
from loraq.compose import load_rows
from loraq.data import data_prompts
from loraq.models import list_layers, load_pipeline
from loraq.models.denoisers import denoiser_of
from loraq.models.layers import family_of
from loraq.quantization.calibration import InputCapture
from loraq.quantization.layer_errors import layer_errors
from loraq.quantization.quantizer import quantize_model
from loraq.runner.generate import image_batch

MODEL, PROMPTS, ROWS, STEPS = "tiny_pixart", 2, 512, 8
SIXTEEN = ("format@quant.branch_weight=fp16", "format@quant.branch_activation=fp16")
BALANCED = ("quant.statistics=weights", "quant.transform.smooth=balanced")
GPTQ = "quant.rounding.kind=gptq"
NVFP4 = ("format@quant.weight=nvfp4", "format@quant.activation=nvfp4")
RECIPES: dict[str, tuple[str, ...]] = {
    "LoRaQ best (rotated, W4A8 branch)": ("loraq_best",),
    "O2, 16-bit branch": ("loraq_o2", *SIXTEEN),
    "… balanced": ("loraq_o2", *SIXTEEN, *BALANCED),
    "… balanced, GPTQ": ("loraq_o2", *SIXTEEN, *BALANCED, GPTQ),
    "… balanced, GPTQ, an R per layer: `loraq_export`": ("loraq_export",),
    "`loraq_export`, weighted by the inputs' rms": (
        "loraq_export",
        "quant.branch.weighting=diagonal",
    ),
    "`loraq_export`, weighted by their second moment": (
        "loraq_export",
        "quant.branch.weighting=full",
    ),
    "`loraq_export`, scales searched": ("loraq_export", "quant.weight.clip=mse"),
    "`loraq_export`, one SVD": ("loraq_export", "quant.branch.kind=svd"),
    "`loraq_export`, NVFP4": ("loraq_export", *NVFP4),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--blocks", nargs="+", type=int, default=[1, 4], metavar="NUMBER")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    chosen = f"model={MODEL} model.steps={STEPS} data.split=development data.count={PROMPTS}"
    row = load_rows(["method=reference", *chosen.split()])[0]
    settings = {"blocks": options.blocks, "prompts": PROMPTS, "rows": ROWS, "steps": STEPS}
    order = [*RECIPES]
    saved = SavedRows(
        options.output, MODEL, ["name"], lambda found: order.index(found["name"]), settings
    )
    network = denoiser_of(pipe := load_pipeline(row.model, "cpu"))
    family = family_of(network)
    blocks = tuple(f"transformer_blocks.{number}." for number in options.blocks)
    kept = [layer for layer in list_layers(network, family) if layer.name.startswith(blocks)]
    inputs = InputCapture(network, kept, ROWS, row.model.step_count, 0)
    with torch.inference_mode(), inputs:
        image_batch(pipe, row.model, data_prompts(row.data), 0, "latent")
    for name, (method, *overrides) in RECIPES.items():
        if saved.has(name):
            continue
        found = recipe(method, *overrides)
        made = quantize_model(network, kept, found, progress=None, family=family)
        errors = layer_errors(made, network, kept, inputs.inputs())
        values = {
            "name": name,
            "layers": len(kept),
            "rank": made.rank_range,
            "bits_per_weight": made.bits_per_weight,
            "weight_error": fmean(row["weight_error"] for row in errors),
            "output_error": fmean(row["output_error"] for row in errors),
        }
        print(f"{name}: output error {values['output_error']:.4f}", flush=True)
        saved.add(values)


if __name__ == "__main__":
    main()
