"""How much images depend on the batch size, in plain batches and with LoRaQ's batch invariance.

    python -m experiments.bench.batch_size [--images 8] [--sizes 1 8] [--output FILE.json]

The embedded model generates images of the first test captions at each batch size, in 16 bits and
quantised (LoRaQ O2, W4A8 branch), in two processes: `together` uses MKL's default (`MKL_CBWR=AUTO`)
and one call per batch, `loraq` the settings of a run (`utils/batch_invariance.py`). Prints whether
the initial latents are equal, the largest pixel difference (of 255), and the PSNR between the sets.

Expected time: 40 to 94 s on 2 cores. Outcome: results/bench/batch_size.json; with `together` the
quantised images differ as much as the model differs from its reference; with `loraq` they are
equal.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loraq.utils import batch_invariance

MODES = {"together": "AUTO", "loraq": batch_invariance.CBWR_MODE}
"""Mode → the value of MKL_CBWR."""
RECIPE = ("loraq_o2", "format@quant.branch_weight=int4")


def compare_batch_sizes(
    images: int, sizes: Sequence[int], together: bool
) -> dict[str, dict[str, Any]]:
    """Differences between the images of the two batch sizes, with this process's MKL mode."""
    import numpy as np
    import torch

    from loraq import recipe
    from loraq.compose import load_rows
    from loraq.data import data_prompts
    from loraq.models import list_layers, load_pipeline
    from loraq.quantization.quantizer import quantize_model
    from loraq.runner.generate import batch_images, batches, generators, image_batch

    config = load_rows(["method=reference"])[0]
    pipe, model = load_pipeline(config.model, "cpu"), config.model
    prompts = data_prompts(config.data)[:images]
    layers = list_layers(pipe.transformer, model.family)
    quantized = quantize_model(pipe.transformer, layers, recipe(*RECIPE), progress=None)

    def initial_latents(size: int) -> torch.Tensor:
        shape = (model.height, model.width, torch.float32, "cpu")
        channels = pipe.transformer.config.in_channels
        return torch.cat(
            [
                pipe.prepare_latents(len(batch), channels, *shape, generators(batch, 0))
                for batch in batches(prompts, size)
            ]
        )

    found = {}
    for name in ("16-bit", "quantised"):
        if name == "quantised":
            quantized.apply(pipe.transformer)
        one, other = (
            np.stack(
                [
                    np.asarray(image, dtype=np.int64)
                    for batch in batches(prompts, size)
                    for image in (image_batch if together else batch_images)(pipe, model, batch, 0)
                ]
            )
            for size in sizes
        )
        mse = float(np.square(one - other).mean())
        found[name] = {
            "starts_equal": torch.equal(initial_latents(sizes[0]), initial_latents(sizes[1])),
            "largest_of_255": int(abs(one - other).max()),
            "psnr": None if mse == 0 else 10 * math.log10(255**2 / mse),
        }
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run both modes in separate processes, print and write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--sizes", type=int, nargs=2, default=(1, 8))
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    parser.add_argument("--here", choices=MODES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.here:
        print(
            json.dumps(
                compare_batch_sizes(options.images, options.sizes, options.here == "together")
            )
        )
        return
    child_options = ["--images", str(options.images), "--sizes", *map(str, options.sizes)]
    found = {}
    for mode, order in MODES.items():
        done = subprocess.run(
            [sys.executable, "-m", "experiments.bench.batch_size", *child_options, "--here", mode],
            env=os.environ | {"MKL_CBWR": order},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found[mode] = json.loads(done.stdout.splitlines()[-1])
        for name, row in found[mode].items():
            far = "equal" if row["psnr"] is None else f"{row['psnr']:.1f} dB apart"
            print(
                f"{mode:8s}  {name:9s}  {far}, largest difference "
                f"{row['largest_of_255']} of 255, starts equal: {row['starts_equal']}"
            )
    if options.output:
        from loraq.results import record

        settings: dict[str, Any] = {
            "images": options.images,
            "sizes": list(options.sizes),
            "recipe": RECIPE,
        }
        settings["row_invariant"] = batch_invariance.row_invariant()
        record.save_findings({"settings": settings, "modes": found}, options.output)


if __name__ == "__main__":
    main()
