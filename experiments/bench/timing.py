"""Time several implementations in alternating order in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch


def alternate(
    ways: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Per way: seconds of every repeat, their median, and the median ratio to the first way.

    Each runs once before as a warm-up, which compiles kernels and unpacks weights.
    """
    times: dict[str, list[float]] = {way: [] for way in ways}
    for call in ways.values():
        call_seconds(call, device)
    order = list(ways)
    for _ in range(repeats):
        for way in order:
            times[way].append(call_seconds(ways[way], device))
        order = order[1:] + order[:1]
    first = times[next(iter(ways))]
    return {
        way: {
            "seconds": found,
            "median_seconds": median(found),
            "ratio": median(own / base for own, base in zip(found, first, strict=True)),
        }
        for way, found in times.items()
    }


def call_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, including work on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin
