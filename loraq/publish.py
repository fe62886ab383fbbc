"""From finished records to what a person looks at: tables, picture, W&B run, where time went."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loraq.plan import Row
from loraq.record import Record
from loraq.store import write_json

if TYPE_CHECKING:
    from loraq.stages import Workshop

ROWS_FILE = "rows.json"
PICTURE_PROMPTS = 8


@dataclass(frozen=True)
class Outcome:
    """An experiment's records, the folder of its tables, and the text that is printed."""

    records: list[Record]
    folder: Path
    text: str


def publish(
    work: Workshop, finished: Sequence[tuple[Row, Record]], folder: Path, started: float
) -> Outcome:
    """Write tables and picture, hand each record to W&B once, and put the summary together."""
    from loraq.table_text import to_markdown
    from loraq.tables import main_table, write_tables

    records = [record for _, record in finished]
    folder.mkdir(parents=True, exist_ok=True)
    baseline = finished[0][0].config.baseline
    if baseline not in {record.row for record in records}:
        baseline = None
    listed = [{"row": row.name, "record": row.keys["record"]} for row, _ in finished]
    write_json(folder / ROWS_FILE, {"baseline": baseline, "rows": listed})
    write_tables(records, folder, baseline)
    lines = [to_markdown(main_table(records, baseline)), f"Tables:  {folder}/main.md (.tex, .csv)"]
    lines += [f"Records: {work.store.path('record', '*')}/record.json"]
    return Outcome(records, folder, "\n".join([*lines, time_shares(work, started)]))


def time_shares(work: Workshop, started: float) -> str:
    """How this run's time was spent, in percent."""
    total = time.perf_counter() - started
    shares = {**work.seconds, "everything else": total - sum(work.seconds.values())}
    parts = [f"{name} {seconds / total:.0%}" for name, seconds in shares.items()]
    return f"Time:    {total:.0f} s ({', '.join(parts)})"


def summary(record: Record) -> str:
    """One line about a finished row."""
    bits = record.budget.get("bits_per_weight")
    words = [f"{bits:.3f} bits/weight"] if bits else []
    for name, metric in record.metrics.items():
        if metric.get("value") is not None:
            words.append(f"{name} {metric['value']:.4g}")
    return ", ".join(words)


def rewrite(output: Path, experiments: Sequence[str]) -> str:
    """The tables of experiments that were run, made again from their records; their text."""
    import json

    from loraq import record as records
    from loraq.errors import LoraqError, unknown
    from loraq.table_text import to_markdown
    from loraq.tables import main_table, write_tables

    there = {path.parent.name: path for path in sorted(output.glob(f"results/*/{ROWS_FILE}"))}
    if not there:
        raise LoraqError(f"No experiment has finished under {output}/. Run one: make demo")
    lines = []
    for name in experiments or there:
        if name not in there:
            raise unknown("experiment", name, there)
        listed = json.loads(there[name].read_text())
        paths = [output / "record" / row["record"] / "record.json" for row in listed["rows"]]
        made = [records.load(path) for path in paths]
        write_tables(made, there[name].parent, listed["baseline"])
        lines += [f"## {name}", "", to_markdown(main_table(made, listed["baseline"]))]
    return "\n".join(lines)
