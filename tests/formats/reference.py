"""An independent NumPy implementation of docs/formats.md in float64, one block at a time.

It shares no code with loraq.formats: neither tables nor bit operations.
"""

from __future__ import annotations

import math

import numpy as np

INTEGERS = {  # bits, largest code, divisor of the code
    "int4": (4, 7, 1),
    "int6": (6, 31, 1),
    "int8": (8, 127, 1),
    "uint4": (4, 15, 1),
    "mxint8": (8, 127, 64),
    "mxint6": (6, 31, 16),
    "mxint4": (4, 7, 4),
}
FLOATS = {  # exponent bits, mantissa bits, largest value
    "e4m3": (4, 3, 448.0),
    "e5m2": (5, 2, 57344.0),
    "e2m3": (2, 3, 7.5),
    "e3m2": (3, 2, 28.0),
    "e2m1": (2, 1, 6.0),
}


def float_grid(name: str) -> np.ndarray:
    """All non-negative finite values of an ExMy, ascending: the index is the code."""
    exponent_bits, mantissa_bits, largest = FLOATS[name]
    bias = 2 ** (exponent_bits - 1) - 1
    values = []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            if exponent == 0:
                value = math.ldexp(mantissa, 1 - bias - mantissa_bits)
            else:
                value = math.ldexp(2**mantissa_bits + mantissa, exponent - bias - mantissa_bits)
            if value <= largest:
                values.append(value)
    return np.array(values)


def nearest_on_grid(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Codes of the nearest grid values to |values|; ties to the even code; saturating."""
    magnitude = np.abs(values.astype(np.float64))
    upper = np.clip(np.searchsorted(grid, magnitude), 1, len(grid) - 1)
    lower = upper - 1
    middle = (grid[lower] + grid[upper]) / 2
    take_upper = (magnitude > middle) | ((magnitude == middle) & (upper % 2 == 0))
    return np.where(take_upper, upper, lower)


def shared_exponent(absmax: float, largest: float, mantissa_bits: int, rule: str) -> int:
    """The E8M0 exponent of a block, -127..127 - emax, in exact arithmetic."""
    if absmax == 0:
        return -127
    emax = math.frexp(largest)[1] - 1
    fraction, exponent = math.frexp(absmax)  # absmax = fraction · 2^exponent, fraction in [.5, 1)
    exponent -= 1
    if rule == "ceil":
        exponent += fraction > 0.5
    elif rule == "even":
        exponent += round(fraction * 2 ** (mantissa_bits + 1)) == 2 ** (mantissa_bits + 1)
    elif rule == "rceil":
        exponent += fraction > math.frexp(largest)[0]
    return max(-127, min(127, exponent) - emax)


def fake_row(row: np.ndarray, name: str, block: int, rule: str = "floor") -> np.ndarray:
    """One fp32 row of an int, uint, mxint or mxfp format, quantised and dequantised."""
    out = np.zeros(row.shape, np.float32)
    for start in range(0, len(row), block):
        piece = row[start : start + block].astype(np.float64)
        absmax = float(np.abs(piece).max())
        if name in INTEGERS and not name.startswith("mx"):
            largest = INTEGERS[name][1]
            scale = float(np.float16(np.float32(absmax) / np.float32(largest)))
        elif name in INTEGERS:
            bits, largest, divisor = INTEGERS[name]
            exponent = shared_exponent(absmax, largest / divisor, bits - 2, rule)
            scale = math.ldexp(1.0 / divisor, exponent)
        else:
            _, mantissa_bits, largest = FLOATS[name.split("_")[1]]
            scale = math.ldexp(1.0, shared_exponent(absmax, largest, mantissa_bits, rule))
        if scale == 0:
            continue
        if name in INTEGERS:
            low = 0 if name == "uint4" else -largest
            values = np.clip(np.rint(piece / scale), low, largest)
        else:
            grid = float_grid(name.split("_")[1])
            values = np.sign(piece) * grid[nearest_on_grid(piece / scale, grid)]
        out[start : start + block] = values * scale
    return out


def nvfp4_row(
    row: np.ndarray, tensor_scale: np.float32, block: int = 16, least: float = 0.0
) -> np.ndarray:
    """One fp32 row of nvfp4; the maths of its scales is fp32 by definition."""
    out = np.zeros(row.shape, np.float32)
    scales, grid = float_grid("e4m3"), float_grid("e2m1")
    for start in range(0, len(row), block):
        piece = row[start : start + block]
        wanted = max(np.abs(piece).max() / np.float32(6) / tensor_scale, np.float32(least))
        scale = np.float32(scales[nearest_on_grid(np.array([wanted]), scales)[0]]) * tensor_scale
        if scale == 0:
            continue
        codes = nearest_on_grid(piece / scale, grid)
        out[start : start + block] = np.sign(piece) * grid[codes].astype(np.float32) * scale
    return out


def nvfp4_tensor_scale(x: np.ndarray) -> np.float32:
    """absmax / (448·6), or 1."""
    scale = np.abs(x).max() / np.float32(2688)
    return np.float32(scale if scale > 0 else 1)
