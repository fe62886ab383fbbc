"""Columns of the tables: titles, order and number format of the metrics, cells of a record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loraq.results.record import Record
from loraq.results.tables.text import Cell
from loraq.utils.kinds import UNITS, Kind

EQUAL_MEMORY = 0.01  # rows are equal in memory when total bits per weight agree within 1 %
COUNTED = "exact count of the stored bits; no sampling, so no interval"
OVER_LAYERS = "mean over all quantised layers; no sampling, so no interval"


@dataclass(frozen=True)
class Column:
    """Display of a metric: title, and number of decimals after multiplication by `scale`."""

    title: str
    digits: int
    scale: float = 1.0


COLUMNS = {
    "psnr": Column("PSNR", 2),
    "lpips": Column("LPIPS", 4),
    "ssim": Column("SSIM", 4),
    "log_stft": Column("log-STFT distance", 4),
    "snr": Column("SNR", 2),
    "fid": Column("FID", 2),
    "fd": Column("FD", 2),
    "fid_reference": Column("FID to 16-bit", 2),
    "fd_reference": Column("FD to 16-bit", 2),
    "kid": Column("KID", 2, 1e3),
    "alignment": Column("alignment", 4),
    "image_reward": Column("ImageReward", 3),
    "clip_score": Column("CLIPScore", 2),
    "clip_iqa": Column("CLIP-IQA", 4),
}
SUMMARY = (("psnr", "lpips"), ("snr", "log_stft"))
"""Metrics of a summary: of images and videos, of clips of sound."""
ARROWS = {"higher": "↑", "lower": "↓"}


def summary_metrics(records: Sequence[Record]) -> tuple[str, str]:
    """Return the pair of `SUMMARY` that the records measure; that of images if neither."""
    measured = {name for record in records for name in record.metrics}
    return next((pair for pair in SUMMARY if measured.intersection(pair)), SUMMARY[0])


def kind_of(record: Record) -> Kind:
    """Return the kind of a record's outputs."""
    kind: Kind = record.images.get("kind", "image")
    return kind


def unit_of(record: Record) -> str:
    """Return what several of a record's outputs are called."""
    return UNITS[kind_of(record)]


def row_label(record: Record) -> str:
    return record.label or record.row


def equal_memory(record: Record, base: Record) -> bool:
    """Whether the total bits per weight of two rows agree within `EQUAL_MEMORY`."""
    own, reference = record.budget.get("bits_per_weight"), base.budget.get("bits_per_weight")
    return bool(own and reference and abs(own / reference - 1) <= EQUAL_MEMORY)


def metric_names(records: Sequence[Record]) -> list[str]:
    """Return the metrics that any record has, in the order of `COLUMNS`, others last."""
    order = list(COLUMNS)
    names = {name for record in records for name in record.metrics}
    position = {name: place for place, name in enumerate(order)}
    return sorted(names, key=lambda name: (position.get(metric_kind(name), len(order)), name))


def metric_kind(name: str) -> str:
    """Return the metric without its feature extractor: `fd_efflite0` → `fd`."""
    kind = name.rpartition("_")[0]
    return kind if name not in COLUMNS and kind in COLUMNS else name


def metric_column(name: str) -> Column:
    """Return the display of a metric; an unknown metric is shown by its name, with 4 decimals."""
    return COLUMNS.get(metric_kind(name), Column(name, 4))


def column_titles(records: Sequence[Record], names: Sequence[str]) -> list[str]:
    """Return the column titles: metric, feature extractor, scale factor, arrow of the direction."""
    made = []
    for name in names:
        shown = metric_column(name)
        extractor = f" ({name.rpartition('_')[2]})" if metric_kind(name) != name else ""
        directions = [r.metrics[name].get("direction", "") for r in records if name in r.metrics]
        title = shown.title + extractor + (" ×10³" if shown.scale == 1e3 else "")
        made.append(f"{title} {ARROWS.get(directions[0], '')}".rstrip())
    return made


def metric_cell(entry: Mapping[str, Any] | None, name: str, unit: str = "images") -> Cell:
    """Value and interval of a record's entry for the metric `name`; `unit` as of `unit_of`."""
    shown = metric_column(name)
    if not entry:
        return Cell(reason="not measured for this row")
    value, lo, hi = (entry.get(part) for part in ("value", "lo", "hi"))
    reason = entry.get("reason") or "no interval was recorded"
    return Cell(value, lo, hi, shown.digits, shown.scale, reason.replace("images", unit))


def bits_cell(record: Record, base: Record | None) -> Cell:
    """Bits per weight, marked `=` if they equal those of `base`."""
    bits = record.budget.get("bits_per_weight")
    mark = "=" if base is not None and equal_memory(record, base) else ""
    return Cell(bits, digits=3, reason=COUNTED, mark=mark)


def layer_cell(record: Record, name: str) -> Cell:
    """Mean over the quantised layers of `weight_error` or `output_error`."""
    values = [layer[name] for layer in record.layers if layer.get(name) is not None]
    if not values:
        plain = record.config.get("method") == "reference"
        return Cell(reason="no layer is quantised" if plain else "not measured for this row")
    return Cell(sum(values) / len(values), digits=4, reason=OVER_LAYERS)
