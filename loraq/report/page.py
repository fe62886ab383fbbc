"""Records and images of one experiment → the page: what is shown, in which order."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraq.errors import unknown
from loraq.publish import read_experiment
from loraq.record import Record
from loraq.report.gallery import Gallery, gallery, picture
from loraq.results import REPORTED, ROOT
from loraq.store import write_bytes
from loraq.table_text import Cell, Item, Table
from loraq.tables import all_tables

PACKAGES = ("torch", "diffusers", "transformers")
TITLES = {
    "pareto": "Quality against memory",
    "layer_errors": "Relative output error by role and depth",
    "error_steps": "Output error over the denoising steps",
    "convergence": "Loss by round",
}
HEADINGS = {
    "main": "Results",
    "paired": "Paired differences",
    "splits": "Seen and held-out captions",
    "limits": "Weight errors and what is possible",
}


@dataclass(frozen=True)
class TableView:
    """A table for the template: cells are (text, what sorts them, whether a number)."""

    key: str
    heading: str
    title: str
    columns: list[str]
    rows: list[list[tuple[str, float | str, bool]]]
    notes: list[str]


def write_report(folder: Path, target: Path, rows: Sequence[str] | None = None) -> Path:
    """Write the page of an experiment's folder (`outputs/results/NAME`) to `target`.

    rows: those whose images are shown; by default the 16-bit model, the baseline and the best few.
    """
    output = folder.resolve().parents[1]
    listed, records = read_experiment(output, folder.name)
    shown = _shown(records, listed["baseline"], rows)
    text = _render(
        title=folder.name,
        records=records,
        about=_about(records, listed["baseline"]),
        tables=[_view(k, t) for k, t in all_tables(records, listed["baseline"]).items()],
        diagrams=_diagrams(folder),
        gallery=_gallery(output, listed, records, shown),
        rows=[_row(record) for record in records],
        reported=_reported(records[0]),
        command=_command(folder.name, records[0]),
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(target, text.encode("utf-8"))
    return target


def _render(**values: Any) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("loraq", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(**values)


def _about(records: Sequence[Record], baseline: str | None) -> list[tuple[str, str]]:
    first = records[0]
    base = [record.label or record.row for record in records if record.row == baseline]
    machine, days = first.machine, sorted(record.created[:10] for record in records)
    packages = [f"{name} {first.versions[name]}" for name in PACKAGES if name in first.versions]
    return [
        ("model", str(first.config["model"]["name"])),
        ("rows", str(len(records))),
        ("prompts", f"{len(first.images.get('names', ()))}, seeds from their names"),
        ("compared with", base[0] if base else "no row"),
        ("commit", ", ".join(sorted({record.commit or "unknown" for record in records}))),
        ("made", " to ".join(dict.fromkeys((days[0], days[-1])))),
        ("versions", ", ".join(packages)),
        ("machine", f"{machine.get('device', '?')}, {machine.get('cpus', '?')} processors"),
    ]


def _view(key: str, table: Table) -> TableView:
    rows = [[_cell(item) for item in row] for row in table.rows]
    reasons = [
        item.reason
        for row in table.rows
        for item in row
        if isinstance(item, Cell) and item.bare and item.reason
    ]
    notes = [*table.notes, *(f"without interval or value: {r}" for r in dict.fromkeys(reasons))]
    return TableView(key, HEADINGS.get(key, key), table.title, table.columns, rows, notes)


def _cell(item: Item) -> tuple[str, float | str, bool]:
    if isinstance(item, Cell):
        return item.text(), "" if item.value is None else item.value, True
    if isinstance(item, int):
        return f"{item:,}", item, True
    try:
        return item, float(item), True
    except ValueError:
        return item, "" if item == "–" else item, item == "–"


def _diagrams(folder: Path) -> list[tuple[str, str]]:
    """(title, data URI) of the experiment's diagrams; the grid has the gallery in its place."""
    found = []
    for path in sorted(folder.glob("*.png"), key=lambda p: (p.stem not in TITLES, p.stem)):
        if path.stem == "grid":
            continue
        title = TITLES.get(path.stem, path.stem.replace("_", " ").capitalize())
        found.append((title, picture(path.read_bytes(), "png")))
    return found


def _shown(
    records: Sequence[Record], baseline: str | None, rows: Sequence[str] | None
) -> list[Record]:
    by_row = {record.row: record for record in records}
    if rows is not None:
        for row in rows:
            if row not in by_row:
                raise unknown("row", row, by_row)
        return [by_row[row] for row in rows]
    measured = [r for r in records if r.metrics.get("psnr", {}).get("value") is not None]
    best = sorted(measured, key=lambda r: -r.metrics["psnr"]["value"])[:2]
    wanted = ["reference", "rtn", baseline, *(record.row for record in best)]
    return [by_row[row] for row in dict.fromkeys(wanted) if row in by_row]


def _gallery(
    output: Path, listed: dict[str, Any], records: Sequence[Record], shown: Sequence[Record]
) -> Gallery | None:
    """The images of the rows shown; None where they are not there (any more)."""
    keys = {row["row"]: row.get("images") for row in listed["rows"]}
    columns = []
    for record in shown:
        folder = output / "images" / str(keys[record.row])
        if not folder.is_dir():
            return None
        columns.append((record, folder))
    return gallery(columns) if columns else None


def _row(record: Record) -> dict[str, Any]:
    return {
        "name": record.row,
        "label": record.label or record.row,
        "key": record.key,
        "config": json.dumps(record.config, indent=1, ensure_ascii=False),
        "seconds": [(stage, round(spent, 1)) for stage, spent in record.timings.items()],
    }


def _command(name: str, record: Record) -> str:
    experiment, model = record.experiment, record.config["model"]["name"]
    if experiment == "single":
        return f"loraq run method={record.config['method']} …"
    return f"loraq run experiment={experiment}" + (f" model={model}" if model in name else "")


def _reported(record: Record) -> tuple[list[str], list[list[tuple[str, float | str, bool]]]]:
    """Published numbers of the same family of models: beside ours, never among them."""
    family = record.config["model"]["family"]
    header: list[str] = []
    lines: list[dict[str, str]] = []
    for path in sorted((ROOT / "results" / REPORTED).glob("*.csv")):
        with open(path, encoding="utf-8", newline="") as stream:
            for line in csv.DictReader(stream):
                if line["model"].startswith(family):
                    lines.append(line)
                    header += [name for name in line if name not in header]
    front = [name for name in header if name != "source"] + ["source"] * bool(header)
    return front, [[_cell(_dash(line.get(name))) for name in front] for line in lines]


def _dash(text: str | None) -> str:
    return "–" if text in (None, "", "-") else str(text)
