"""Contents of W&B runs as plain data: configuration, summary, and the rows of their tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraq.results.record import Record
from loraq.utils.plain import to_plain

IMAGES = 16  # largest number of rows in the image table
LAYER_COLUMNS = ("layer", "role", "weight_error", "output_error")


@dataclass(frozen=True)
class TrackedImage:
    """One row of the image table: an image and the 16-bit model's image of the same prompt."""

    name: str
    prompt: str
    path: Path
    reference: Path | None = None


def run_config(record: Record) -> dict[str, Any]:
    """Return the resolved configuration and the record's provenance."""
    origin = {
        "key": record.key,
        "row": record.row,
        "commit": record.commit,
        "model_hash": record.model_hash,
        "image_set": record.images.get("hash"),
        "versions": record.versions,
    }
    return {**to_plain(record.config), "record": to_plain(origin)}


def run_summary(record: Record) -> dict[str, Any]:
    """Return flat numbers: psnr, psnr/lo, psnr/hi, psnr/seen, …, budget/…, mean errors, seconds."""
    summary: dict[str, Any] = {}
    for name, entry in record.metrics.items():
        summary[name] = entry.get("value")
        summary[f"{name}/lo"], summary[f"{name}/hi"] = entry.get("lo"), entry.get("hi")
        for part in ("seen", "held_out"):
            if entry.get(part):
                summary[f"{name}/{part}"] = entry[part].get("value")
    summary.update({f"budget/{name}": value for name, value in record.budget.items()})
    for name in ("weight_error", "output_error"):
        values = [layer[name] for layer in record.layers if layer.get(name) is not None]
        summary[name] = sum(values) / len(values) if values else None
    summary.update({f"seconds/{name}": value for name, value in record.timings.items()})
    summary["n"] = len(record.images.get("names", ()))
    return {name: value for name, value in summary.items() if _shown(value)}


def layer_rows(record: Record) -> list[list[Any]]:
    """Return the rows of the layer table, with `LAYER_COLUMNS`."""
    return [[layer.get(column) for column in LAYER_COLUMNS] for layer in record.layers]


def image_values(record: Record, names: Sequence[str]) -> tuple[list[str], list[list[Any]]]:
    """Return the metrics with per-image values, and their values for each image in `names`."""
    stored = list(record.images.get("names", ()))
    metrics = [name for name, entry in record.metrics.items() if entry.get("per_image")]
    rows = []
    for name in names:
        place = stored.index(name) if name in stored else None
        rows.append([_of_image(record.metrics[metric], place) for metric in metrics])
    return metrics, rows


def overview_rows(records: Sequence[Record]) -> tuple[list[str], list[list[Any]]]:
    """Return columns and one row per record: bits per weight, metrics with their intervals."""
    metrics = list(dict.fromkeys(name for record in records for name in record.metrics))
    columns = ["row", "label", "method", "bits_per_weight"]
    columns += [f"{name}{part}" for name in metrics for part in ("", "/lo", "/hi")]
    lines = []
    for record in records:
        line = [record.row, record.label or record.row, str(record.config.get("method", ""))]
        numbers: list[Any] = [record.budget.get("bits_per_weight")]
        for name in metrics:
            entry = record.metrics.get(name, {})
            numbers += [entry.get(part) for part in ("value", "lo", "hi")]
        lines.append([*line, *(value if _shown(value) else None for value in numbers)])
    return columns, lines


def _of_image(entry: Mapping[str, Any], place: int | None) -> float | None:
    value = None if place is None else entry["per_image"][place]
    return value if _shown(value) else None


def _shown(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))
