"""Instructions of the kernels per recipe and GPU, and the modelled time over that of bf16.

    python -m experiments.bench.kernel_counts --output results/bench/kernel_counts.json
    python -m experiments.bench.kernel_counts --targets sm90 --recipes "int4, int8 branch"

Expected time: 10 minutes on 2 cores for everything; no GPU is needed. `gpu_model.py` states the
model. A record that exists is updated, entry by entry. `--before COMMIT` marks numbers of older
kernels, which this file and its two neighbours count when copied to a checkout of them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from experiments.bench.compiled import KERNELS, Kernel, compile_layer
from experiments.bench.gpu_model import GPUS, bf16_seconds, kernel_seconds
from loraq.formats import Format, get_format
from loraq.results import record

# main weight and activation, branch weight and activation
RECIPES = {
    "bf16": ("bf16", "bf16", None, None),
    "int4, int8 branch": ("int4", "int4", "int8", "int8"),
    "int4, fp16 branch": ("int4", "int4", "fp16", "fp16"),
    "int8": ("int8", "int8", "int8", "int8"),
    "mxfp4, mxfp8 branch": ("mxfp4_e2m1", "mxfp4_e2m1", "mxfp8_e4m3", "mxfp8_e4m3"),
    "nvfp4, mxfp8 branch": ("nvfp4", "nvfp4", "mxfp8_e4m3", "mxfp8_e4m3"),
    "mxint4, mxint8 branch": ("mxint4", "mxint4", "mxint8", "mxint8"),
}
RANK = 32
SHAPES = {  # model: tokens of batch 16 with guidance, and (outputs, inputs) of its layers
    "pixart_sigma": (32 * 4096, ((1152, 1152), (4608, 1152), (1152, 4608))),
    "sana_1_6b": (32 * 1024, ((2240, 2240), (11200, 2240), (2240, 5600))),
}
COMPILED = (1152, 1152, RANK)  # every shape has the same hints, so that one serves all


def recipe_formats(name: str) -> dict[str, Format | None]:
    """The four formats of a recipe."""
    weight, activation, branch_weight, branch_activation = RECIPES[name]
    fixed = "fixed" if activation == "nvfp4" else None
    return {
        "weight": get_format(weight),
        "activation": get_format(activation, tensor_scale=fixed),
        "branch_weight": get_format(branch_weight) if branch_weight else None,
        "branch_activation": get_format(branch_activation) if branch_activation else None,
    }


def modelled(kernels: list[Kernel], target: str) -> dict[str, Any]:
    """Per shape: seconds of bf16 and of each kernel, and their ratios."""
    gpu, found = GPUS[target], {}
    for model, (tokens, shapes) in SHAPES.items():
        for outputs, width in shapes:
            base = bf16_seconds(gpu, tokens, outputs, width)
            seconds = {
                kernel.name: kernel_seconds(kernel, gpu, target, tokens, (outputs, width, RANK))
                for kernel in kernels
            }
            found[f"{model} {width}→{outputs}"] = {
                "bf16_milliseconds": round(1e3 * base, 4),
                "milliseconds": {name: round(1e3 * value, 4) for name, value in seconds.items()},
                "linear_over_bf16": round(seconds["linear"] / base, 3),
                "layer_over_bf16": round(sum(seconds.values()) / base, 3),
            }
    return found


def main() -> None:
    """Compile, count, model, print, and update the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=list(GPUS), choices=GPUS)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--kernels", nargs="+", default=KERNELS, choices=KERNELS)
    parser.add_argument("--before", metavar="COMMIT")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = {}
    if options.output and options.output.is_file():
        found = json.loads(options.output.read_text(encoding="utf-8"))
    found |= {"rank": RANK, "gpus": {t: vars(g) for t, g in GPUS.items()}}
    part = found.setdefault("before" if options.before else "now", {})
    if options.before:
        found["before_commit"] = options.before
    for target in options.targets:
        for recipe in options.recipes:
            kernels = compile_layer(recipe_formats(recipe), COMPILED, 4096, target, options.kernels)
            times = modelled(kernels, target) if options.kernels == KERNELS else {}
            part.setdefault(target, {})[recipe] = {
                "kernels": [kernel.record() for kernel in kernels],
                "times": times,
            }
            ratios = " ".join(
                f"{row['linear_over_bf16']:.2f}/{row['layer_over_bf16']:.2f}"
                for row in times.values()
            )
            print(f"{target} {recipe}: linear/layer over bf16 {ratios}", flush=True)
            if options.output:
                record.save_findings(found, options.output)


if __name__ == "__main__":
    main()
