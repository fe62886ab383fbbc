"""Build the report page of an experiment from its records and images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loraq.errors import LoraqError
from loraq.results.record import Record
from loraq.results.report.commands import experiment_command, row_commands
from loraq.results.report.figures import svg_diagrams
from loraq.results.report.gallery import make_gallery
from loraq.results.report.heat import LEVELS, heat_maps
from loraq.results.report.pareto import make_pareto
from loraq.results.report.published import published_numbers
from loraq.results.report.source import Source, find_source
from loraq.results.report.views import table_view
from loraq.results.tables.columns import unit_of
from loraq.results.tables.tables import all_tables
from loraq.utils.files import write_bytes
from loraq.utils.machine import machine_text

PACKAGES = ("torch", "diffusers", "transformers")
LIMIT = 15_000_000  # largest size of a page in bytes


def write_report(folder: Path, target: Path, rows: Sequence[str] | None = None) -> Path:
    """Write the report of an experiment (`outputs/results/NAME`) to `target`; returns the path.

    If the folder holds no finished run, the committed records of NAME are used.
    rows: rows whose images and heat maps come first; by default the 16-bit model, RTN, the baseline
        and the two rows with the highest PSNR.

    LoraqError for an unknown experiment or row, or a page above 15 MB.
    """
    source = find_source(folder)
    records, shown = source.records, source.select(rows)
    columns = source.image_folders(shown)
    commands = row_commands(records)
    text = _render(
        title=source.name,
        unit=unit_of(records[0]),
        lead=_lead(source),
        about=_about(source),
        tables=[table_view(k, t) for k, t in all_tables(records, source.baseline).items()],
        pareto=make_pareto(records, shown),
        figures=svg_diagrams(records),
        heat=heat_maps(records, shown),
        levels=LEVELS,
        gallery=make_gallery(columns) if columns else None,
        rows=_rows(records, commands),
        published=published_numbers(records[0]),
        command=experiment_command(records, commands),
    )
    data = text.encode("utf-8")
    if len(data) > LIMIT:
        raise LoraqError(
            f"The page has {len(data):,} bytes; the limit is {LIMIT:,}. Show fewer rows: "
            f"--rows {','.join(record.row for record in shown[:3])}"
        )
    write_bytes(target, data)
    return target


def _render(**values: Any) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("loraq.results", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(**values)


def _lead(source: Source) -> str:
    """Return one sentence: rows, model, prompts, baseline."""
    first = source.records[0]
    count, prompts = len(source.records), len(first.images.get("names", ()))
    base = next((r.label or r.row for r in source.records if r.row == source.baseline), None)
    against = f", compared with {base}" if base else ""
    return (
        f"{count} row{'s' * (count != 1)} on {first.config['model']['name']}, the same {prompts} "
        f"prompts and seeds for every row{against}."
    )


def _about(source: Source) -> list[tuple[str, str]]:
    records, first = source.records, source.records[0]
    days = sorted(record.created[:10] for record in records)
    machines = dict.fromkeys(machine_text(record.machine) for record in records)
    packages = [f"{name} {first.versions[name]}" for name in PACKAGES if name in first.versions]
    return [
        ("records", f"results/{source.name}, committed" if source.committed else "of a run"),
        ("commit", ", ".join(sorted({record.commit[:13] or "unknown" for record in records}))),
        ("made", " to ".join(dict.fromkeys((days[0], days[-1])))),
        ("versions", ", ".join(packages)),
        ("machine", " and ".join(machines)),
    ]


def _rows(records: Sequence[Record], commands: Mapping[str, str]) -> list[dict[str, Any]]:
    return [
        {
            "name": record.row,
            "label": record.label or record.row,
            "key": record.key,
            "command": commands[record.row],
            "config": json.dumps(record.config, indent=1, ensure_ascii=False),
            "seconds": [(stage, f"{spent:,.1f}") for stage, spent in record.timings.items()],
        }
        for record in records
    ]
