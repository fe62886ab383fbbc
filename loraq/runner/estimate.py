"""The plan as text, for `--dry-run`: cached products, products to make, estimated time and disk.

Estimates use the manifests of earlier products of the same kind; without any, assumed rates.
"""

from __future__ import annotations

from collections.abc import Sequence

from loraq.compose import load_rows
from loraq.models.files import weight_files
from loraq.models.source import resolve_folder
from loraq.runner.plan import check_rows, plan_rows, weights_to_fetch
from loraq.runner.rows import Row, Stage
from loraq.runner.store import PARTIAL, Store
from loraq.utils.console import duration


def dry_run(overrides: Sequence[str]) -> str:
    """The plan of the rows that `overrides` compose, checked as a run would; makes nothing."""
    configs = load_rows(overrides)
    store = Store(configs[0].output, read_only=True)
    rows = plan_rows(configs, store)
    check_rows(rows)
    return "\n".join([describe_plan(rows, store), *_downloads(rows)])


def _downloads(rows: Sequence[Row]) -> list[str]:
    """The weights of metrics that the run would download first, with the command that does."""
    lines = [f"  {weights.describe_missing()}" for weights in weights_to_fetch(rows)]
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


def remaining_seconds(rows: Sequence[Row], store: Store) -> float:
    """Estimated time in seconds of the stages that these rows still need."""
    seconds, counted = 0.0, set()
    for row in rows:
        for stage in sorted(row.todo):
            product = row.product(stage)
            if product not in counted and not store.path(*product).is_dir():
                counted.add(product)
                seconds += _estimate(row, stage, store)[0]
    return seconds


def _estimate(row: Row, stage: Stage, store: Store) -> tuple[float, float, str]:
    """(seconds, bytes, source): rates measured in earlier runs, otherwise assumed rates."""
    units = {
        Stage.CALIBRATION_INPUTS: len(row.calibration),
        Stage.MOMENTS: len(row.calibration),
        Stage.MEASURING_INPUTS: len(row.measuring),
        Stage.IMAGES: len(row.prompts),
        Stage.EMBEDDINGS: len(row.prompts),
    }.get(stage, 1)
    measured = store.rates(stage.folder, row.kind(stage))
    if measured:
        count = len(measured)
        seconds = sum(rate.seconds for rate in measured) / count
        size = sum(rate.size for rate in measured) / count
        return units * seconds, units * size, f"measured on {count} earlier"
    return _from_assumed_rates(row, stage, units)


def _from_assumed_rates(row: Row, stage: Stage, units: int) -> tuple[float, float, str]:
    """From counted operations, assuming 40 GFLOP/s on a CPU and 100 TFLOP/s on a GPU."""
    model = row.config.model
    files = weight_files(resolve_folder(model) / "transformer", "diffusers", model.variant)
    stored = sum(path.stat().st_size for path in files)
    weights, rate = stored / 2, 4e10 if row.device == "cpu" else 1e14
    tokens = (model.height / 16) * (model.width / 16)
    forward = 2 * weights * tokens / rate * (2 if model.guidance > 1 else 1)
    image = forward * model.steps * (1 if row.recipe is None else 2)
    pixels = model.height * model.width
    seconds, size = {
        "images": (units * image, units * pixels * 1.5),
        "embeddings": (units * forward, units * 64 * 1024 * 4),
        "inputs": (units * forward * model.steps, 64 * row.config.calibration.rows_per_layer * 768),
        "moments": (units * forward * model.steps, weights * 4),
        "sensitivity": (100 * forward * units, 1e4),
        "quantised": (weights * 2e-6, weights * 0.7),
        "measured": (len(row.prompts) * pixels * 1e-5, 1e5),
        "record": (0.1, 1e5),
    }[stage.folder]
    return seconds, size, "from assumed rates"
