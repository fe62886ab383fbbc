"""Generated parts of the documentation: the numbers in README and docs come from records alone.

A page marks what is generated; everything between the two lines is rewritten:

    <!-- generated: table demo -->
    <!-- /generated -->

`table EXPERIMENT` (or EXPERIMENT/paired, EXPERIMENT/splits) and `brief EXPERIMENT`, both with @ROW
behind where differences are not to the experiment's own baseline, `time EXPERIMENT`,
`times all` (a table of all experiments'), `seconds EXPERIMENT` (each row's), `reported FILE`,
`bench RECORD` of results/bench/.

    python -m loraq.readme           rewrite every page and the tables under results/
    python -m loraq.readme --check   only look; exit 2 and name what is stale

Reads records and nothing else: no torch, no images, no W&B.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from loraq import results
from loraq.errors import LoraqError, unknown
from loraq.results import ROOT, Results, committed, not_yet
from loraq.tables import all_tables
from loraq.tables import bench as bench_tables
from loraq.tables import times as time_tables
from loraq.tables.brief import brief_table
from loraq.tables.text import to_markdown
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


def pages(root: Path = ROOT) -> list[Path]:
    """The pages that may hold generated blocks."""
    return sorted({path for pattern in PAGES for path in root.glob(pattern)})


def refresh(path: Path, check: bool = False, root: Path = ROOT) -> bool:
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


def refresh_all(check: bool = False, root: Path = ROOT) -> list[Path]:
    """Every page and every table under `results/`; those that were stale."""
    tables = [p for name in results.names(root) for p in results.refresh_tables(name, root, check)]
    return [*tables, *(path for path in pages(root) if refresh(path, check, root))]


def table(name: str, root: Path) -> str:
    """`EXPERIMENT` or `EXPERIMENT/TABLE`: a table of `loraq.tables`, and where it comes from."""
    name, _, row = name.partition("@")
    experiment, _, part = name.partition("/")
    found = committed(experiment, root)
    if found is None:
        return not_yet(experiment)
    tables = all_tables(found.records, row or found.baseline)
    if (part or "main") not in tables:
        raise unknown(f"table of {experiment}", part, tables)
    return f"{to_markdown(tables[part or 'main'])}\n{_origin(found)}"


def brief(name: str, root: Path) -> str:
    """The columns that are read first (`brief_table`)."""
    name, _, row = name.partition("@")
    found = committed(name, root)
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
    if rows := results.changed_checkouts(found):
        text += f" **Made from code with uncommitted changes (`+`): {', '.join(rows)}.**"
    return text


def reported(name: str, root: Path) -> str:
    """A file of published numbers as a table; a dash where the source gives none."""
    folder = root / "results" / results.REPORTED
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
}


def main(arguments: Sequence[str] | None = None) -> None:
    from loraq.utils.console import reporting_errors

    parser = argparse.ArgumentParser(
        prog="python -m loraq.readme",
        description="Rewrite the generated parts of README, docs and results/ from records.",
    )
    parser.add_argument("--check", action="store_true", help="only look: exit 2 when stale")
    options = parser.parse_args(arguments)
    with reporting_errors():
        stale = [str(path.relative_to(ROOT)) for path in refresh_all(options.check)]
        if stale and options.check:
            raise LoraqError(f"stale: {', '.join(stale)}. Rewrite with: python -m loraq.readme")
        print("\n".join(f"rewritten: {name}" for name in stale) or "everything is up to date")


if __name__ == "__main__":
    main()
