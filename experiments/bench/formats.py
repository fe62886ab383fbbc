"""Time of fake_quantize compared with the packed path, per format.

    python -m experiments.bench.formats [--rows 4000] [--width 1152] [--repeats 9] [--threads 2]
                                        [--clock wall|cpu]

Expected time: half a minute on 2 cores. All functions alternate in one process, so that other load
affects all; values are the fastest of the repeats, in ns per value, and the ratio is packed / fake.
`copy` is x.clone(), the time of one pass over memory. On a busy machine use `--threads 1 --clock
cpu`, because threads then wait for each other.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch

from loraq.formats import FORMATS, dequantize, fake_quantize, get_format, quantize

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def seconds(function: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds of one call."""
    begin = clock()
    function()
    return clock() - begin


def main() -> None:
    """Measure all formats and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option, default in (("rows", 4000), ("width", 1152), ("repeats", 9), ("threads", 2)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    x = torch.randn(options.rows, options.width, generator=torch.Generator().manual_seed(0))
    print(
        f"{options.rows} x {options.width}, {torch.get_num_threads()} threads, "
        f"{options.clock} ns per value"
    )
    print(f"{'format':<12}{'fake':>8}{'quantize':>10}{'dequantize':>12}{'ratio':>8}{'copy':>8}")
    for name in FORMATS:
        fmt = get_format(name, tensor_scale="token" if name == "nvfp4" else None)
        stored = quantize(x, fmt)
        if not torch.equal(fake_quantize(x, fmt), dequantize(stored)):
            raise SystemExit(f"{name}: the two paths differ")
        sides: tuple[Callable[[], object], ...] = (
            partial(fake_quantize, x, fmt),
            partial(quantize, x, fmt),
            partial(dequantize, stored),
            x.clone,
        )
        times = [
            [seconds(side, CLOCKS[options.clock]) for side in sides] for _ in range(options.repeats)
        ]
        fake, pack, unpack, copy = (
            min(side) / x.numel() * 1e9 for side in zip(*times, strict=True)
        )
        ratio = (pack + unpack) / fake
        print(f"{name:<12}{fake:>8.2f}{pack:>10.2f}{unpack:>12.2f}{ratio:>8.1f}{copy:>8.2f}")


if __name__ == "__main__":
    main()
