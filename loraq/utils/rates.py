"""The speed of devices: what a kernel is assumed to reach, for estimates and the cost model.

Assumptions, not measurements: of the published peak, large 16-bit products reach two fifths, and
copies three quarters. `experiments/bench/roofline.py` shows what follows from them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """What one device reaches.

    name: part of the name that the driver gives. flops: 16-bit operations a second. bandwidth:
    bytes a second. launch: seconds between two kernels that do next to nothing. memory: bytes.
    """

    name: str
    flops: float
    bandwidth: float
    launch: float
    memory: float


DEVICES = {
    rates.name: rates
    for rates in (
        Rates("H100", 400e12, 2.5e12, 6e-6, 80e9),
        Rates("H200", 400e12, 3.6e12, 6e-6, 141e9),
        Rates("A100", 180e12, 1.5e12, 6e-6, 80e9),
        Rates("MI300X", 400e12, 3.6e12, 8e-6, 192e9),
        Rates("4090", 120e12, 0.8e12, 6e-6, 24e9),
    )
}
CPU = Rates("a CPU of two cores", 100e9, 20e9, 5e-6, 16e9)
UNKNOWN = Rates("an unknown GPU, assumed slow", 60e12, 0.6e12, 8e-6, 16e9)


def gpu_rates(name: str | None) -> Rates:
    """The row of `DEVICES` whose name is in the driver's `name`; for another, the slow UNKNOWN."""
    return next((rates for known, rates in DEVICES.items() if known in (name or "")), UNKNOWN)
