"""Generated blocks of README and docs: their numbers come only from records.

A page marks a block by two lines; the text between them is rewritten:

    <!-- generated: table demo -->
    <!-- /generated -->

Kinds of blocks:

    table EXPERIMENT[/TABLE][@ROW]   a table: main (default), paired, splits or limits
    brief EXPERIMENT[@ROW]           the summary table
    time EXPERIMENT                  run time of the experiment, by stage
    times all                        run times of all experiments
    seconds EXPERIMENT               seconds of calibration and quantisation of each row
    reported FILE                    results/reported/FILE.csv
    bench RECORD                     results/bench/RECORD.json
    gpu PART                         a part of results/bench/gpu.json (`make test-gpu`)
    drawing packages                 the packages of loraq/ and their order
    way weight | prompt              the modules that one weight or one prompt passes

@ROW replaces the experiment's own baseline.

    python -m loraq.readme           rewrite all pages and the tables under results/
    python -m loraq.readme --check   write nothing; exit with 2 and list files that are out of date

Reads only records: no torch, no images, no W&B.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path

from loraq.errors import LoraqError, unknown
from loraq.results.committed import (
    REPORTED,
    Results,
    find_results,
    not_measured_text,
    refresh_tables,
    result_names,
    rows_from_changed_code,
)
from loraq.results.pages import bench as bench_tables
from loraq.results.pages import gpu as gpu_tables
from loraq.results.pages import layout
from loraq.results.pages import times as time_tables
from loraq.results.tables.brief import brief_table
from loraq.results.tables.tables import all_tables
from loraq.results.tables.text import to_markdown
from loraq.utils.assets import CHECKOUT
from loraq.utils.files import write_text

PAGES = (
    "*.md",
    "docs/**/*.md",
    "experiments/**/*.md",
    "results/*.md",
    "results/reported/*.md",
)
BLOCK = re.compile(
    r"^(?P<open><!-- generated: (?P<kind>\S+) (?P<name>\S+) -->)\n"
    r"(?P<text>(?:(?!<!-- ).*\n)*?)"
    r"(?P<close><!-- /generated -->)$",
    re.MULTILINE,
)
MARKER = re.compile(r"^<!-- /?generated\b.*$", re.MULTILINE)


def documentation_pages(root: Path = CHECKOUT) -> list[Path]:
    """Return the pages that can contain generated blocks."""
    return sorted({path for pattern in PAGES for path in root.glob(pattern)})


def refresh_page(path: Path, check: bool = False, root: Path = CHECKOUT) -> bool:
    """Rewrite a page's generated blocks unless `check`; returns whether they were out of date.

    LoraqError for an unknown block or a marker line without its counterpart.
    """
    text = path.read_text(encoding="utf-8")

    def rendered(match: re.Match[str]) -> str:
        kind, name = match["kind"], match["name"]
        if kind not in KINDS:
            raise LoraqError(f"{path}: {unknown('kind of generated block', kind, KINDS)}")
        try:
            body = KINDS[kind](name, root)
        except LoraqError as error:
            raise LoraqError(f"{path}: {match['open']}: {error}") from None
        return f"{match['open']}\n{body.strip()}\n{match['close']}"

    fresh, count = BLOCK.subn(rendered, text)
    if (markers := len(MARKER.findall(text))) != 2 * count:
        raise LoraqError(
            f"{path}: {markers} marker lines but {count} complete blocks. A block is a line "
            "'<!-- generated: KIND NAME -->' and a line '<!-- /generated -->'."
        )
    stale = fresh != text
    if stale and not check:
        write_text(path, fresh)
    return stale


def refresh_all(check: bool = False, root: Path = CHECKOUT) -> list[Path]:
    """Refresh all pages and all tables under `results/`; returns those that were out of date."""
    tables = [p for name in result_names(root) for p in refresh_tables(name, root, check)]
    return [
        *tables,
        *(path for path in documentation_pages(root) if refresh_page(path, check, root)),
    ]


def table_block(name: str, root: Path) -> str:
    """Render `table EXPERIMENT[/TABLE][@ROW]`, with the provenance of its records."""
    name, _, row = name.partition("@")
    experiment, _, part = name.partition("/")
    found = find_results(experiment, root)
    if found is None:
        return not_measured_text(experiment)
    tables = all_tables(found.records, row or found.baseline)
    if (part or "main") not in tables:
        raise unknown(f"table of {experiment}", part, tables)
    return f"{to_markdown(tables[part or 'main'])}\n{_provenance(found)}"


def brief_block(name: str, root: Path) -> str:
    """Render `brief EXPERIMENT[@ROW]` (`brief_table`), with the provenance of its records."""
    name, _, row = name.partition("@")
    found = find_results(name, root)
    if found is None:
        return not_measured_text(name)
    return f"{to_markdown(brief_table(found.records, row or found.baseline))}\n{_provenance(found)}"


def _provenance(found: Results) -> str:
    """Return one sentence of provenance: records, commits, versions, machine."""
    first = found.records[0]
    commits = sorted({record.commit or "unknown" for record in found.records})
    versions = [
        f"{package} {first.versions[package]}"
        for package in ("torch", "diffusers", "transformers")
        if package in first.versions
    ]
    words = [
        f"Made from `results/{found.name}/records/`",
        f"commit {', '.join(f'`{commit}`' for commit in commits)}",
        *versions,
        time_tables.machines_text(found),
    ]
    text = "; ".join(filter(None, words)) + "."
    if rows := rows_from_changed_code(found):
        text += f" **Made from code with uncommitted changes (`+`): {', '.join(rows)}.**"
    return text


def reported_block(name: str, root: Path) -> str:
    """Render `reported FILE`: a CSV of published numbers as a table, "–" for missing numbers."""
    folder = root / "results" / REPORTED
    files = {path.stem: path for path in folder.glob("*.csv")}
    if name not in files:
        raise unknown("file of published numbers", name, files)
    with open(files[name], encoding="utf-8", newline="") as stream:
        header, *rows = list(csv.reader(stream))
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += [
        "| " + " | ".join("–" if cell == "-" else cell for cell in row) + " |" for row in rows
    ]
    return "\n".join(["Published by others, not measured here.", "", *lines])


def bench_block(name: str, root: Path) -> str:
    """Render `bench RECORD`: `results/bench/RECORD.json` as a table."""
    return bench_tables.bench_block(root / "results" / "bench" / f"{name}.json")


KINDS: dict[str, Callable[[str, Path], str]] = {
    "table": table_block,
    "brief": brief_block,
    "time": time_tables.time_block,
    "times": time_tables.times_block,
    "seconds": time_tables.seconds_block,
    "reported": reported_block,
    "bench": bench_block,
    "gpu": gpu_tables.gpu_block,
    "drawing": layout.drawing_block,
    "way": layout.way_block,
}
