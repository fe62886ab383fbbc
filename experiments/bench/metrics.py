"""Images per second and memory of every metric, at the size of full-scale evaluation.

    python -m experiments.bench.metrics --output results/bench/metrics.json

Pictures of 1024 px, their noisy copies and prompts; each metric in a process of its own, over a
quarter of them and over all. Six minutes on 2 cores. Found (results/bench/metrics.json): SSIM's
1.2 to alignment's 10.5 images a second, 5000 images in 0.1 to 1.2 hours a metric, and a peak that
hardly grows.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from loraq import record
from loraq.errors import LoraqError, unknown

METRICS = ("psnr", "ssim", "lpips", "frechet", "kid", "alignment")
WHOLE = 5000


def write_pictures(folder: Path, count: int, side: int) -> None:
    """Smooth fields, and the same with noise, as PNGs."""
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


def run(folder: str, name: str, count: int, threads: int, workers: int, answer: Any) -> None:
    """One metric over the first `count` pictures: (seconds without the start, peak bytes)."""
    import torch

    from loraq.metrics import ImageSet, compute

    torch.set_num_threads(threads)
    names = [f"{number:05d}" for number in range(count)]
    prompts = tuple(f"picture number {name}" for name in names)

    def images(kind: str, first: int) -> ImageSet:
        found = ImageSet.of_folder(Path(folder) / kind, names[:first])
        return ImageSet(found.paths, found.names, prompts[:first])

    def measured(first: int) -> None:
        compute(
            name,
            images("noisy", first),
            images("clean", first),
            images("clean", first),
            workers=workers,
        )

    measured(2)  # loads networks
    began = time.perf_counter()
    measured(count)
    seconds = time.perf_counter() - began
    answer.put((seconds, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


def measure(folder: Path, name: str, count: int, threads: int, workers: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    found = {}
    for first in (count // 4, count):
        answer = context.Queue()
        job = (str(folder), name, first, threads, workers, answer)
        process = context.Process(target=run, args=job)
        process.start()
        found[first] = answer.get()
        process.join()
    seconds, peak = found[count]
    return {
        "images_per_second": count / seconds,
        "hours_for_5000": WHOLE * seconds / count / 3600,
        "peak_bytes": peak,
        "peak_growth": peak / found[count // 4][1],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the table, writes the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--metrics", nargs="+", default=list(METRICS), metavar="METRIC")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    if options.count < 16:
        raise LoraqError(f"--count {options.count} is below the limit 16. Give 16 or more.")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder), options.count, options.side)
        for name in options.metrics:
            if name not in METRICS:
                raise unknown("metric without files of its own", name, METRICS)
            given = (options.count, options.threads, options.workers)
            found[name] = row = measure(Path(folder), name, *given)
            print(
                f"{name:10} {row['images_per_second']:7.2f} images/s, 5000 in "
                f"{row['hours_for_5000']:.2f} h, peak {row['peak_bytes'] / 2**20:.0f} MiB "
                f"({row['peak_growth']:.2f} of a quarter's)",
                flush=True,
            )
    if options.output is not None:
        settings = {k: v for k, v in vars(options).items() if k not in ("output", "metrics")}
        record.save_findings({"settings": settings, "metrics": found}, options.output)


if __name__ == "__main__":
    main()
