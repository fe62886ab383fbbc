"""Time of fake_quantize beside the packed path, per format.

    python -m experiments.bench.formats [--rows 4000] [--width 1152] [--repeats 9] [--threads 2]

Takes about a minute on 2 cores. Both sides run in one process, alternately, so that other load
on the machine hits both; the figure is the fastest of the repeats, in ns per value, and the ratio
is packed / fake. `copy` is the time of one plain x.clone(): what a single pass over memory costs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from loraq.formats import FORMATS, dequantize, fake_quantize, get_format, quantize


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def main() -> None:
    """Prints one line per format."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option, default in (("rows", 4000), ("width", 1152), ("repeats", 9), ("threads", 2)):
        parser.add_argument(f"--{option}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    x = torch.randn(options.rows, options.width, generator=torch.Generator().manual_seed(0))
    print(f"{options.rows} x {options.width}, {torch.get_num_threads()} threads, ns per value")
    print(f"{'format':<12}{'fake':>8}{'quantize':>10}{'dequantize':>12}{'ratio':>8}{'copy':>8}")
    for name in FORMATS:
        fmt = get_format(name, tensor_scale="token" if name == "nvfp4" else None)
        stored = quantize(x, fmt)
        if not torch.equal(fake_quantize(x, fmt), dequantize(stored)):
            raise SystemExit(f"{name}: the two paths differ")
        sides: tuple[Callable[[], object], ...] = (
            lambda fmt=fmt: fake_quantize(x, fmt),
            lambda fmt=fmt: quantize(x, fmt),
            lambda stored=stored: dequantize(stored),
            x.clone,
        )
        times = [[seconds(side) for side in sides] for _ in range(options.repeats)]
        fake, pack, unpack, copy = (
            min(side) / x.numel() * 1e9 for side in zip(*times, strict=True)
        )
        ratio = (pack + unpack) / fake
        print(f"{name:<12}{fake:>8.2f}{pack:>10.2f}{unpack:>12.2f}{ratio:>8.1f}{copy:>8.2f}")


if __name__ == "__main__":
    main()
