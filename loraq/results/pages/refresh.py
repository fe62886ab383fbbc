"""Generated parts of the documentation: the numbers in README and docs come from records alone.

A page marks what is generated; everything between the two lines is rewritten:

    <!-- generated: table demo -->
    <!-- /generated -->

`table EXPERIMENT` (or EXPERIMENT/paired, EXPERIMENT/splits) and `brief EXPERIMENT`, both with @ROW
behind where differences are not to the experiment's own baseline, `time EXPERIMENT`,
`times all` (a table of all experiments'), `seconds EXPERIMENT` (each row's), `reported FILE`,
`bench RECORD` of results/bench/, `drawing packages`, `way weight` and `way prompt`.

    python -m loraq.readme           rewrite every page and the tables under results/
    python -m loraq.readme --check   only look; exit 2 and name what is stale

Reads records and nothing else: no torch, no images, no W&B.
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
    changed_checkouts,
    find_results,
    not_yet,
    refresh_tables,
    result_names,
)
from loraq.results.pages import bench as bench_tables
from loraq.results.pages import layout
from loraq.results.pages import times as time_tables
from loraq.results.tables.brief import brief_table
from loraq.results.tables.tables import all_tables
from loraq.results.tables.text import to_markdown
from loraq.utils.assets import CHECKOUT
from loraq.utils.files import write_bytes

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


def pages(root: Path = CHECKOUT) -> list[Path]:
    """The pages that may hold generated blocks."""
    return sorted({path for pattern in PAGES for path in root.glob(pattern)})


def refresh(path: Path, check: bool = False, root: Path = CHECKOUT) -> bool:
    """Rewrite the page's generated blocks; whether they were stale. `check` only looks."""
    text = path.read_text(encoding="utf-8")

    def made(match: re.Match[str]) -> str:
        kind, name = match["kind"], match["name"]
        if kind not in KINDS:
            raise LoraqError(f"{path}: {unknown('kind of generated block', kind, KINDS)}")
        try:
            body = KINDS[kind](name, root)
        except LoraqError as error:
            raise LoraqError(f"{path}: {match['open']}: {error}") from None
        return f"{match['open']}\n{body.strip()}\n{match['close']}"

    fresh, count = BLOCK.subn(made, text)
    if (markers := len(MARKER.findall(text))) != 2 * count:
        raise LoraqError(
            f"{path}: {markers} marker lines but {count} whole blocks. A block is a line "
            "'<!-- generated: KIND NAME -->' and a line '<!-- /generated -->'."
        )
    stale = fresh != text
    if stale and not check:
        write_bytes(path, fresh.encode("utf-8"))
    return stale


def refresh_all(check: bool = False, root: Path = CHECKOUT) -> list[Path]:
    """Every page and every table under `results/`; those that were stale."""
    tables = [p for name in result_names(root) for p in refresh_tables(name, root, check)]
    return [*tables, *(path for path in pages(root) if refresh(path, check, root))]


def table(name: str, root: Path) -> str:
    """`EXPERIMENT` or `EXPERIMENT/TABLE`: a table of `loraq.tables`, and where it comes from."""
    name, _, row = name.partition("@")
    experiment, _, part = name.partition("/")
    found = find_results(experiment, root)
    if found is None:
        return not_yet(experiment)
    tables = all_tables(found.records, row or found.baseline)
    if (part or "main") not in tables:
        raise unknown(f"table of {experiment}", part, tables)
    return f"{to_markdown(tables[part or 'main'])}\n{_origin(found)}"


def brief(name: str, root: Path) -> str:
    """The columns that are read first (`brief_table`)."""
    name, _, row = name.partition("@")
    found = find_results(name, root)
    if found is None:
        return not_yet(name)
    return f"{to_markdown(brief_table(found.records, row or found.baseline))}\n{_origin(found)}"


def _origin(found: Results) -> str:
    """Where the numbers come from: records, commits, versions, machine."""
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
        time_tables.machine(found),
    ]
    text = "; ".join(filter(None, words)) + "."
    if rows := changed_checkouts(found):
        text += f" **Made from code with uncommitted changes (`+`): {', '.join(rows)}.**"
    return text


def reported(name: str, root: Path) -> str:
    """A file of published numbers as a table; a dash where the source gives none."""
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


def bench(name: str, root: Path) -> str:
    """`results/bench/NAME.json` as a table."""
    return bench_tables.markdown(root / "results" / "bench" / f"{name}.json")


KINDS: dict[str, Callable[[str, Path], str]] = {
    "table": table,
    "brief": brief,
    "time": time_tables.time,
    "times": time_tables.times,
    "seconds": time_tables.seconds,
    "reported": reported,
    "bench": bench,
    "drawing": layout.drawing,
    "way": layout.way,
}
