"""The notes of a table on what computed its rows: machines, versions, packages, weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loraq.results.record import Record
from loraq.results.tables.columns import column_titles, metric_names, row_label
from loraq.utils.machine import machine_text

UNKNOWN = "not recorded"
HASH = "_sha256"


def computed_by_notes(records: Sequence[Record]) -> list[str]:
    """Return one note with all metrics, and one for each metric in which the rows differ.

    Records of earlier releases hold no version of a metric; without any, there is no note. Another
    note says which rows ran on which machine, if they ran on several.
    """
    same, differing = [], []
    names = metric_names(records)
    for name, title in zip(names, column_titles(records, names), strict=True):
        rows: dict[str, list[str]] = {}
        for record in records:
            entry = record.metrics.get(name, {})
            if entry.get("value") is not None:
                rows.setdefault(_computed_by(entry), []).append(row_label(record))
        if len(rows) > 1:
            parts = "; ".join(f"{', '.join(labels)}: {what}" for what, labels in rows.items())
            differing.append(f"{title}: rows of different versions do not compare. {parts}")
        elif rows.keys() - {UNKNOWN}:
            same.append(f"{title}: {next(iter(rows))}")
    computed = ["computed by: " + "; ".join(same)] if same else []
    return [*_machine_note(records), *differing, *computed]


def _machine_note(records: Sequence[Record]) -> list[str]:
    rows: dict[str, list[str]] = {}
    for record in records:
        rows.setdefault(machine_text(record.machine), []).append(row_label(record))
    if len(rows) < 2:
        return []
    parts = "; ".join(f"{', '.join(labels)}: {machine}" for machine, labels in rows.items())
    return [f"machine: times of different machines do not compare, and last bits differ. {parts}"]


def _computed_by(entry: Mapping[str, Any]) -> str:
    if "version" not in entry:
        return UNKNOWN
    details = entry.get("details", {})
    parts = [f"{name} {version}" for name, version in details.get("packages", {}).items()]
    hashes = {name.removesuffix(HASH): details[name] for name in details if name.endswith(HASH)}
    parts += [f"{name} {digest[:8]}" for name, digest in hashes.items()]
    return f"version {entry['version']} ({', '.join(parts)})"
