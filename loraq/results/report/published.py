"""Published numbers of models of the same family, in a table of their own."""

from __future__ import annotations

import csv

from loraq.results.committed import REPORTED
from loraq.results.record import Record
from loraq.results.report.views import CellView, aligned, cell_view
from loraq.utils.assets import CHECKOUT

TITLES = {
    **{"model": "model", "dataset": "prompts", "method": "method", "format": "format"},
    **{"fid": "FID ↓", "image_reward": "ImageReward ↑", "lpips": "LPIPS ↓", "psnr": "PSNR ↑"},
    **{"clip": "CLIP score ↑", "source": "source"},
}


def published_numbers(record: Record) -> tuple[list[str], list[list[CellView]]]:
    """Return columns and rows of the family from all files in `results/reported/`."""
    family = record.config["model"]["family"]
    header: list[str] = []
    lines: list[dict[str, str]] = []
    for path in sorted((CHECKOUT / "results" / REPORTED).glob("*.csv")):
        with open(path, encoding="utf-8", newline="") as stream:
            for line in csv.DictReader(stream):
                if line["model"].startswith(family):
                    lines.append(line)
                    header += [name for name in line if name not in header]
    known = [name for name in TITLES if name in header and name != "source"]
    names = [*known, *(name for name in header if name not in TITLES), *["source"] * bool(header)]
    rows = [[cell_view(_dash(line.get(name))) for name in names] for line in lines]
    return [TITLES.get(name, name) for name in names], aligned(rows)


def _dash(text: str | None) -> str:
    return "–" if text in (None, "", "-") else str(text)
