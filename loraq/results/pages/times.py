"""Run times of experiments, from their records: blocks of the documentation pages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from loraq.errors import unknown
from loraq.results.committed import (
    Results,
    find_results,
    not_measured_text,
    read_results,
    result_names,
)
from loraq.results.pages.bench import Columns, columns_table
from loraq.utils.console import duration
from loraq.utils.machine import machine_text

CALIBRATION = ("inputs:calibrate", "moments", "sensitivity")
STAGES = {"inputs": "activations", "quantised": "quantising"}


def machines_text(found: Results) -> str:
    """Return the machines that an experiment's rows ran on."""
    return " and ".join(sorted({machine_text(record.machine) for record in found.records}))


def time_block(name: str, root: Path) -> str:
    """Render `time EXPERIMENT`: total run time and its stages, without metrics."""
    found = find_results(name, root)
    if found is None:
        return not_measured_text(name)
    spent = _spent(found)
    parts = [f"{STAGES.get(stage, stage)} {duration(seconds)}" for stage, seconds in spent.items()]
    return (
        f"`{name}`, {len(found.records)} rows of {_prompts(found)} prompts: "
        f"{duration(sum(spent.values()))} ({', '.join(parts)}; metrics not counted) on "
        f"{machines_text(found)}."
    )


def _spent(found: Results) -> dict[str, float]:
    """Return stage → seconds; a result that several rows share counts once."""
    spent: dict[str, set[float]] = {}
    for record in found.records:
        for stage, seconds in record.timings.items():
            spent.setdefault(stage.split(":")[0], set()).add(seconds)
    return {stage: sum(seconds) for stage, seconds in spent.items()}


def _prompts(found: Results) -> int:
    return len(found.records[0].images.get("names", ()))


def times_block(name: str, root: Path) -> str:
    """Render `times all`: the run times of every committed experiment."""
    if name != "all":
        raise unknown("list of times", name, ["all"])
    lines = ["| experiment | rows | prompts | time | images | quantising | machine |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | --- |")
    for experiment in result_names(root):
        found = read_results(experiment, root)
        spent = _spent(found)
        seconds = (sum(spent.values()), spent.get("images", 0.0), spent.get("quantised", 0.0))
        cells = [f"`{experiment}`", len(found.records), _prompts(found), *map(duration, seconds)]
        lines.append(f"| {' | '.join(map(str, [*cells, machines_text(found)]))} |")
    return "\n".join(lines)


def seconds_block(name: str, root: Path) -> str:
    """Render `seconds EXPERIMENT`: seconds of each quantised row before its first image."""
    found = find_results(name, root)
    if found is None:
        return not_measured_text(name)
    columns: Columns = {
        "row": lambda record: record.label,
        "calibration activations, s": lambda record: _calibration_seconds(record.timings),
        "quantising, s": lambda record: f"{record.timings['quantised']:.1f}",
    }
    quantised = [record for record in found.records if "quantised" in record.timings]
    lines = columns_table(columns, quantised)
    return "\n".join([*lines, "", f"`results/{found.name}/records/`; {machines_text(found)}."])


def _calibration_seconds(spent: Mapping[str, float]) -> str:
    """Return the seconds of the calibration activations that a row reads, "–" if it reads none."""
    read = [spent[stage] for stage in CALIBRATION if stage in spent]
    return f"{sum(read):.1f}" if read else "–"
