"""How much images depend on the batch size, with a whole batch at once and as LoRaQ makes them.

    python -m experiments.bench.batch_size [--images 8] [--sizes 1 8] [--output FILE.json]

The embedded model makes the first test captions at each batch size, in 16 bits and quantised (LoRaQ
O2, W4A8 branch), in two processes: `together` is MKL as it comes (`MKL_CBWR=AUTO`) and the whole
batch in one call, `loraq` what runs do (`utils/batch_invariance.py`). Printed: whether the starts
are equal, the largest difference of a pixel (of 255), and the PSNR between the two sets.

Expected time: 40 to 94 s on 2 cores. Outcome: results/bench/batch_size.json; together the
quantised images are as far apart as the model is from its reference, as LoRaQ makes them equal.
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
"""What MKL is asked for in each."""
RECIPE = ("loraq_o2", "format@quant.branch_weight=int4")


def compare(images: int, sizes: Sequence[int], together: bool) -> dict[str, dict[str, Any]]:
    """Differences of the images between the two batch sizes, in this process's arithmetic."""
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
    quantised = quantize_model(pipe.transformer, layers, recipe(*RECIPE), progress=None)

    def starts(size: int) -> torch.Tensor:
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
            quantised.apply(pipe.transformer)
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
            "starts_equal": torch.equal(starts(sizes[0]), starts(sizes[1])),
            "largest_of_255": int(abs(one - other).max()),
            "psnr": None if mse == 0 else 10 * math.log10(255**2 / mse),
        }
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs both modes as processes of their own, prints, writes the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--sizes", type=int, nargs=2, default=(1, 8))
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    parser.add_argument("--here", choices=MODES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.here:
        print(json.dumps(compare(options.images, options.sizes, options.here == "together")))
        return
    asked = ["--images", str(options.images), "--sizes", *map(str, options.sizes)]
    found = {}
    for mode, order in MODES.items():
        done = subprocess.run(
            [sys.executable, "-m", "experiments.bench.batch_size", *asked, "--here", mode],
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
