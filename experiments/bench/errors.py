"""How often tables err: coverage of intervals, and claims where there is no difference.

    python -m experiments.bench.errors [--to results/bench/errors.json]

Draws paired differences whose true mean is 0, for N prompts and families of R rows, and counts

    coverage   how often the 95 % interval of one row holds 0
    claims     how often a family has a row called better or worse, after Holm's correction

for this version's intervals and tests, and for the percentile bootstrap of earlier ones (2000
resamples; it has no claims for 51 or more rows). Claims are counted without the smallest N of a
verdict (`SMALLEST_VERDICT`), which they justify. Differences:

    exchanged   the committed rows' differences to their baselines (N = 128), with a random sign for
                each prompt: the two rows could be exchanged
    close       those of rows that are neither better nor worse, resampled, minus their mean
    distant     those of the other rows, likewise: the most skewed
    normal, lognormal (σ = 1)

KID: coverage of its expected value, for features like the embedded model's real ones and images
that resemble them. Expected time: 5 min on two cores. Outcome: results/bench/errors.json,
docs/protocol.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from loraq.metrics.common.features import load_features
from loraq.metrics.common.intervals import (
    FLIPS,
    interval_ends,
    mean_p_values,
    sign_flip_p_values,
)
from loraq.metrics.kid import kernel_distance, kernel_interval, make_kernels, resample_counts
from loraq.results.committed import read_results, result_names
from loraq.results.record import save_findings
from loraq.results.tables.tables import SIGNIFICANCE, find_row, has_per_image
from loraq.utils.assets import ASSETS

METRICS = ("psnr", "lpips", "ssim")
SIZES = (2, 4, 8, 16, 32, 64, 128, 256)
FAMILIES = {1: 10_000, 10: 1000, 60: 500}
"""Rows of a family → number of families drawn."""
BEFORE = {1: 2000, 10: 100}
"""The same for the percentile bootstrap."""
RESAMPLES = 2000
KID_SIZES, KID_DRAWS, KID_RESAMPLES = (4, 8, 16, 32, 64, 128), 200, 500

Draw = Callable[[np.random.Generator, int, int, int], np.ndarray]
"""(generator, N, R, families) → differences (N, families·R)."""


def committed_differences(metric: str, prompts: int = 128) -> np.ndarray:
    """(prompts, rows): row − baseline, of every committed experiment with that many prompts."""
    found = []
    for name in result_names():
        results = read_results(name)
        if results.baseline is None or len(results.records[0].images["names"]) != prompts:
            continue
        base = find_row(results.records, results.baseline)
        for row in results.records:
            if row is not base and has_per_image(row, metric) and has_per_image(base, metric):
                values = (np.asarray(r.metrics[metric]["per_image"]) for r in (row, base))
                found.append(np.subtract(*values))
    made = np.unique(np.stack(found), axis=0).T  # experiments share rows
    return made[:, np.ptp(made, axis=0) > 0]


def exchanged(real: np.ndarray) -> Draw:
    def draw(random: np.random.Generator, n: int, rows: int, families: int) -> np.ndarray:
        return _resampled(real, random, n, rows, families, signs=True)

    return draw


def centred(real: np.ndarray) -> Draw:
    def draw(random: np.random.Generator, n: int, rows: int, families: int) -> np.ndarray:
        return _resampled(real - real.mean(0), random, n, rows, families, signs=False)

    return draw


def _resampled(
    real: np.ndarray, random: np.random.Generator, n: int, rows: int, families: int, signs: bool
) -> np.ndarray:
    """Rows of a family have the same prompts and signs."""
    prompts = random.integers(0, len(real), size=(n, families, 1))
    values = real[prompts, random.integers(0, real.shape[1], size=(families, rows))]
    if signs:
        values *= random.choice([-1.0, 1.0], size=(n, families, 1))
    return values.reshape(n, families * rows)


def kinds() -> dict[str, Draw]:
    """Name → differences without a true mean."""
    found: dict[str, Draw] = {}
    for metric in METRICS:
        real = committed_differences(metric)
        lo, hi = interval_ends(real)
        close = (lo <= 0) & (hi >= 0)
        found[f"{metric} exchanged"] = exchanged(real)
        found[f"{metric} close"] = centred(real[:, close])
        found[f"{metric} distant"] = centred(real[:, ~close])
    found["normal"] = lambda random, n, rows, families: random.normal(size=(n, families * rows))
    found["lognormal"] = lambda random, n, rows, families: (
        random.lognormal(size=(n, families * rows)) - np.exp(0.5)
    )
    return found


def claimed(values: np.ndarray, rows: int) -> float:
    """Share of the families with a claim, by the present tests."""
    p_values, bound = mean_p_values(values), SIGNIFICANCE / rows
    likely = np.flatnonzero(p_values <= bound)  # others cannot be claimed
    flips = max(10_000, FLIPS * rows)
    for part in np.array_split(likely, len(likely) // 256 + 1):
        found = sign_flip_p_values(values[:, part], flips)
        p_values[part] = np.maximum(p_values[part], found)
    return float((p_values.reshape(-1, rows).min(1) <= bound).mean())


def bootstrap(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ends of the percentile bootstrap's intervals, and its p-values."""
    means = resample_counts(len(values), RESAMPLES, 0) @ values / len(values)
    lo, hi = np.quantile(means, [0.025, 0.975], axis=0)
    tail = np.minimum((means <= 0).sum(0), (means >= 0).sum(0))
    return lo, hi, np.minimum(1.0, 2 * (tail + 1) / (RESAMPLES + 1))


def measure(draw: Draw, n: int, seed: int) -> dict[str, Any]:
    """Coverage and claims at one N, now and before; the families' sizes are the keys of claims."""
    random = np.random.default_rng([seed, n])
    row: dict[str, Any] = {"n": n, "claims": {}, "claims_before": {}}
    for rows, families in FAMILIES.items():
        values = draw(random, n, rows, families)
        if rows == 1:
            lo, hi = interval_ends(values)
            row["coverage"] = float(((lo <= 0) & (hi >= 0)).mean())
        row["claims"][str(rows)] = claimed(values, rows)
    for rows, families in BEFORE.items():
        lo, hi, p_values = bootstrap(draw(random, n, rows, families))
        excludes = (lo > 0) | (hi < 0)
        if rows == 1:
            row["coverage_before"] = float(1 - excludes.mean())
        made = (p_values <= SIGNIFICANCE / rows) & excludes
        row["claims_before"][str(rows)] = float(made.reshape(-1, rows).any(1).mean())
    return row


def kid_coverage(n: int, seed: int) -> float:
    """How often KID's bootstrap interval holds its expected value (the mean of all draws)."""
    random = np.random.default_rng([seed, n])
    real = load_features(ASSETS / "real_features.safetensors").values.astype(np.float64)
    centre, spread = real.mean(0), real.std(0)
    _, scale, directions = np.linalg.svd(real - centre, full_matrices=False)
    values, ends = [], []
    for number in range(KID_DRAWS):
        parts = random.standard_t(5, size=(n, len(scale))) * scale / np.sqrt(len(real) * 5 / 3)
        x = np.maximum(centre + parts @ directions, 0)
        y = 0.8 * x + 0.3 * spread * random.normal(size=x.shape)
        kernels = make_kernels(x, y)
        values.append(kernel_distance(kernels))
        ends.append(kernel_interval(kernels, True, KID_RESAMPLES, number))
    lo, hi = np.array(ends).T
    return float(((lo <= np.mean(values)) & (hi >= np.mean(values))).mean())


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate, print and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    found = kinds()
    rows = []
    for seed, (name, draw) in enumerate(tqdm(found.items(), desc="differences")):
        for n in SIZES:
            rows.append({"differences": name, **measure(draw, n, seed)})
            tqdm.write(str(rows[-1]))
    kid = [{"n": n, "coverage": kid_coverage(n, 0)} for n in KID_SIZES]
    print(kid)
    if options.to is not None:
        families, before = ({str(n): c for n, c in one.items()} for one in (FAMILIES, BEFORE))
        settings = {"families": families, "families_before": before, "resamples": RESAMPLES}
        save_findings({"settings": settings, "simulations": rows, "kid": kid}, options.to)


if __name__ == "__main__":
    main()
