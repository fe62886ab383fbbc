"""The plan as text, for `--dry-run`: cached products, products to make, estimated time and disk.

Estimates use the manifests of earlier products of the same kind; without any, the cost model
(`forecast.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from loraq.compose import load_rows
from loraq.config import Config
from loraq.models.hub import planned_fetches
from loraq.runner.forecast import forecast, stage_units
from loraq.runner.notes import model_notes
from loraq.runner.plan import check_inputs, check_rows, plan_rows, to_measure, weights_to_fetch
from loraq.runner.rows import Row, Stage
from loraq.runner.store import PARTIAL, Store
from loraq.utils.console import duration, show_messages
from loraq.utils.rates import CPU, gpu_rates

_AFTER_FETCH = (
    "Keys, time and disk space follow from these files. A run fetches them before anything else; "
    "without --dry-run it does so now."
)


def dry_run(overrides: Sequence[str], last: Stage = Stage.RECORD) -> str:
    """The plan of the rows that `overrides` compose, checked as a run would; makes nothing.

    last: the stage that the command runs to. Of a hub model that is not in the cache, only what a
    run would fetch first.
    """
    show_messages()
    configs = load_rows(overrides)
    if last is Stage.RECORD:
        check_inputs(configs)
    if fetches := planned_fetches([config.model for config in configs]):
        return "\n".join([*map(str, fetches), *_downloads(configs), _AFTER_FETCH])
    store = Store(configs[0].output, read_only=True)
    rows = plan_rows(configs, store, last)
    check_rows(rows)
    notes = model_notes(row.config.model for row in rows if row.todo)
    return "\n".join([describe_plan(rows, store), *notes, *_downloads(to_measure(rows))])


def _downloads(configs: Sequence[Config]) -> list[str]:
    """The weights of metrics that the run would download first, with the command that does."""
    lines = [f"  {weights.describe_missing()}" for weights in weights_to_fetch(configs)]
    if lines:
        lines.insert(0, "To download first, by this run or now by `loraq fetch weights`:")
    return lines


def describe_plan(rows: Sequence[Row], store: Store) -> str:
    """Per row and stage: key, state, and estimated time and size of what will be made."""
    lines, total_seconds, total_bytes = [], 0.0, 0.0
    planned: set[tuple[str, str]] = set()
    for row in rows:
        lines.append(f"{row.name}  ({row.label})")
        for stage in row.stages:
            product = row.product(stage)
            if stage not in row.todo:
                there = store.path(*product).is_dir()
                state = "cached" if there or product in planned else "not needed"
                lines.append(f"  {stage:17} {row.keys[stage]}  {state}")
                continue
            if product in planned:
                lines.append(f"  {stage:17} {row.keys[stage]}  shared with a row above")
                continue
            planned.add(product)
            seconds, size, source = _estimate(row, stage, store)
            total_seconds, total_bytes = total_seconds + seconds, total_bytes + size
            partial = store.path(product[0], product[1] + PARTIAL).is_dir()
            elsewhere = f"; {row.elsewhere[stage]}" if stage in row.elsewhere else ""
            lines.append(
                f"  {stage:17} {row.keys[stage]}  to make{', begun' if partial else ''}: "
                f"about {duration(seconds)}, {size / 1e6:.1f} MB ({source}){elsewhere}"
            )
    lines.append(
        f"In all about {duration(total_seconds)} and {total_bytes / 1e6:.0f} MB under "
        f"{store.root}/ for {len(rows)} rows."
    )
    return "\n".join(lines)


class Remaining:
    """Estimated time of the rows that are still to run; each product is looked at once.

    A product counts in the first row that needs it. The sums are kept per kind, so that times
    measured in this run count at once.
    """

    def __init__(self, rows: Sequence[Row], store: Store) -> None:
        self._store = store
        self._rows: list[list[_Work]] = []
        self._left: dict[tuple[str, str], _Work] = {}
        counted: set[tuple[str, str]] = set()
        for row in rows:
            first = {stage for stage in row.todo if row.product(stage) not in counted}
            counted |= {row.product(stage) for stage in first}
            self._rows.append([_work(row, stage, store) for stage in sorted(first)])
            for work in self._rows[-1]:
                self._add(work, 1)
        self._started = 0

    def seconds(self, number: int) -> float:
        """Seconds of the rows from `number` on (0: all); rows are asked for in their order."""
        for row in self._rows[self._started : number]:
            for work in row:
                self._add(work, -1)
        self._started = max(self._started, number)
        total = 0.0
        for (stage, kind), work in self._left.items():
            rate = self._store.rate(stage, kind)
            total += work.modelled if rate is None else work.units * rate.seconds
        return max(total, 0.0)

    def _add(self, work: _Work, sign: int) -> None:
        left = self._left.get(work.kind, _Work(work.kind, 0, 0.0))
        units, modelled = left.units + sign * work.units, left.modelled + sign * work.modelled
        self._left[work.kind] = _Work(work.kind, units, modelled)


class _Work(NamedTuple):
    """kind: folder and kind of products; modelled: seconds, 0 if the kind was measured before."""

    kind: tuple[str, str]
    units: int
    modelled: float


def _work(row: Row, stage: Stage, store: Store) -> _Work:
    kind = stage.folder, row.kind(stage)
    modelled = 0.0 if store.rate(*kind) else _estimate(row, stage, store)[0]
    return _Work(kind, stage_units(row, stage), modelled)


def _estimate(row: Row, stage: Stage, store: Store) -> tuple[float, float, str]:
    """(seconds, bytes, source): rates measured in earlier runs, otherwise the cost model's."""
    measured, units = store.rate(stage.folder, row.kind(stage)), stage_units(row, stage)
    if measured is not None:
        source = f"measured on {measured.products} earlier"
        return units * measured.seconds, units * measured.size, source
    rates = CPU if row.arithmetic is None else gpu_rates(row.arithmetic["name"])
    return *forecast(row, stage, rates), f"modelled for {rates.name}"
