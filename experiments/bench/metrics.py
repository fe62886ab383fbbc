"""Images per second and memory of every metric, at the size of full-scale evaluation.

    python -m experiments.bench.metrics --output results/bench/metrics.json

Runs each metric in a separate process on images of 1024 px, their noisy copies and prompts, over a
quarter of them and over all. FID, CLIPScore and ImageReward use random weights in networks of the
published sizes: their files may be unavailable, and time does not depend on the values.

Expected time: four to ten minutes on 2 cores (`--count 32`, 64). Outcome:
results/bench/metrics.json, docs/speed.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from experiments.parity.clip import LARGE, write_clip
from experiments.parity.twins import golden_scores, write_image_reward, write_inception
from loraq.errors import LoraqError, unknown
from loraq.metrics import clip_score, image_reward
from loraq.metrics.common import features
from loraq.results import record

METRICS: dict[str, tuple[str, dict[str, Any]]] = {
    "psnr": ("psnr", {}),
    "ssim": ("ssim", {}),
    "lpips": ("lpips", {}),
    "fd_efflite0": ("frechet", {"extractor": "efflite0"}),
    "fid": ("frechet", {"extractor": "inception"}),
    "kid": ("kid", {"extractor": "inception"}),
    "alignment": ("alignment", {}),
    "clip_score": ("clip_score", {}),
    "image_reward": ("image_reward", {}),
}
"""Row → the metric and its options."""
FULL_SCALE = 5000


def write_weights(folder: Path) -> None:
    """Write networks of the published sizes and set the environment variables that name them."""
    made = {
        features.INCEPTION_VARIABLE: write_inception,
        clip_score.VARIABLE: lambda place: write_clip(place, LARGE),
        image_reward.VARIABLE: lambda place: write_image_reward(place, golden_scores("large")),
    }
    for variable, write in made.items():
        place = folder / variable
        place.mkdir()
        write(place)
        os.environ[variable] = str(place)


def write_images(folder: Path, count: int, side: int) -> None:
    """Write smooth images, with and without noise, as PNGs."""
    y, x = np.mgrid[0:side, 0:side] / side
    for number in range(count):
        draw = np.random.default_rng(number)
        waves = draw.uniform(2, 30, size=(3, 2))
        clean = np.stack([np.sin(a * x + b * y) for a, b in waves], -1) * 110 + 127
        noisy = clean + draw.normal(0, 6, clean.shape)
        for kind, values in (("clean", clean), ("noisy", noisy)):
            pixels = np.clip(values, 0, 255).round().astype(np.uint8)
            (folder / kind).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(folder / kind / f"{number:05d}.png", compress_level=1)


def time_metric(
    folder: Path, row: str, count: int, threads: int, workers: int
) -> tuple[float, int]:
    """One row over the first `count` images: (seconds after a warm-up, peak bytes)."""
    import torch

    from loraq.metrics.common.image_set import ImageSet
    from loraq.metrics.registry import compute

    torch.set_num_threads(threads)
    metric, options = METRICS[row]
    names = [f"{number:05d}" for number in range(count)]
    prompts = tuple(f"picture number {name}" for name in names)

    def images(kind: str, first: int) -> ImageSet:
        found = ImageSet.of_folder(folder / kind, names[:first])
        return ImageSet(found.paths, found.names, prompts[:first])

    def compute_over(first: int) -> None:
        clean = images("clean", first)
        compute(metric, images("noisy", first), clean, clean, workers=workers, **options)

    compute_over(2)  # warm-up: loads networks
    began = time.perf_counter()
    compute_over(count)
    seconds = time.perf_counter() - began
    return seconds, peak_bytes()


def peak_bytes() -> int:
    """Peak memory of this process; getrusage would include its parent's at the fork."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def measure_metric(
    folder: Path, row: str, count: int, threads: int, workers: int
) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    found = {}
    for first in (count // 4, count):
        with ProcessPoolExecutor(1, mp_context=context) as process:
            found[first] = process.submit(
                time_metric, folder, row, first, threads, workers
            ).result()
    seconds, peak = found[count]
    return {
        "images_per_second": count / seconds,
        "hours_for_5000": FULL_SCALE * seconds / count / 3600,
        "peak_bytes": peak,
        "peak_growth": peak / found[count // 4][1],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--metrics", nargs="+", default=list(METRICS), metavar="METRIC")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    if options.count < 16:
        raise LoraqError(f"--count {options.count} is below the limit 16. Set 16 or more.")
    for name in options.metrics:
        if name not in METRICS:
            raise unknown("row", name, METRICS)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), options.count, options.side)
        write_weights(Path(folder))
        for name in options.metrics:
            given = (options.count, options.threads, options.workers)
            found[name] = row = measure_metric(Path(folder), name, *given)
            print(
                f"{name:12} {row['images_per_second']:7.2f} images/s, 5000 in "
                f"{row['hours_for_5000']:.2f} h, peak {row['peak_bytes'] / 2**20:.0f} MiB "
                f"({row['peak_growth']:.2f} of a quarter's)",
                flush=True,
            )
    if options.output is not None:
        settings = {k: v for k, v in vars(options).items() if k not in ("output", "metrics")}
        record.save_findings({"settings": settings, "metrics": found}, options.output)


if __name__ == "__main__":
    main()
