"""A finished record → one Weights & Biases run; the only file that imports wandb.

Offline unless the config says otherwise. W&B shows, it does not keep: tables never read it, and
whatever goes wrong here is a warning, because the record is already on disk.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from loraq.errors import unknown
from loraq.record import Record, plain

MODES = ("offline", "online", "disabled")
IMAGES = 16  # rows of the image table: enough to look at, small on disk
DONE = "complete.txt"


@dataclass(frozen=True)
class TrackedImage:
    """One row of the image table: an image, and the 16-bit model's image of the same prompt."""

    name: str
    prompt: str
    path: Path
    reference: Path | None = None


def track(
    record: Record,
    folder: str | os.PathLike[str],
    mode: str = "offline",
    project: str = "loraq",
    images: Sequence[TrackedImage] = (),
) -> Path | None:
    """Write `record` as a W&B run under `folder`/wandb; returns the run's folder.

    None where tracking is disabled or failed (a warning says why). A record that was already
    written offline is not written again.
    """
    if mode not in MODES:
        raise unknown("tracking.mode", mode, MODES)
    if mode == "disabled":
        return None
    folder = Path(folder)
    if mode == "offline" and (found := tracked(record.key, folder)):
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _inside(folder):
            return _write(record, folder, mode, project, images)
    except Exception as error:
        warnings.warn(
            f"W&B run of {record.row!r} was not written ({type(error).__name__}: {error}); its "
            "record is safe. tracking.mode=disabled leaves W&B out",
            stacklevel=2,
        )
        return None


def tracked(key: str, folder: str | os.PathLike[str]) -> Path | None:
    """The folder of a complete offline run of this record, if there is one."""
    found = sorted(Path(folder).glob(f"wandb/offline-run-*-{key}/{DONE}"))
    return found[-1].parent if found else None


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Keep W&B's staged artefacts and caches under `folder`, where a later sync finds them.

    Variables that the user has set win; the others are put back afterwards.
    """
    ours = {"WANDB_DATA_DIR": "data", "WANDB_CACHE_DIR": "cache"}
    ours = {name: place for name, place in ours.items() if name not in os.environ}
    for name, place in ours.items():
        os.environ[name] = str(folder.resolve() / "wandb" / place)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def _write(
    record: Record, folder: Path, mode: str, project: str, images: Sequence[TrackedImage]
) -> Path:
    import wandb

    settings = wandb.Settings(
        silent=True, console="off", x_disable_stats=True, x_disable_meta=True, disable_git=True
    )
    run = wandb.init(
        project=project,
        id=record.key,
        name=record.label or record.row,
        group=record.experiment,
        job_type=str(record.config.get("method") or record.row),
        config=config_of(record),
        dir=str(folder),
        mode=cast(Any, mode),
        reinit="create_new",
        settings=settings,
    )
    failed = 1
    try:
        run.summary.update(summary_of(record))
        tables: dict[str, Any] = {}
        if record.layers:
            columns = ["layer", "role", "weight_error", "output_error"]
            rows = [[layer.get(column) for column in columns] for layer in record.layers]
            tables["layers"] = wandb.Table(columns=columns, data=rows)
        if images:
            tables["images"] = _image_table(wandb, record, images)
        if tables:
            run.log(tables)
        failed = 0
    finally:
        run.finish(exit_code=failed)
    path = Path(run.dir).parent
    if mode == "offline":
        _settle(path / f"run-{record.key}.wandb")
    (path / DONE).write_text(f"{record.key}\n", encoding="utf-8")
    return path


def _settle(log: Path, patience: float = 60.0, pause: float = 0.1) -> None:
    """Wait until the run's log lies on disk: W&B's service still writes it after `finish`."""
    deadline, size, still = time.monotonic() + patience, -1, 0
    while still < 3:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{log.name} was not written within {patience:g} s")
        time.sleep(pause)
        now = log.stat().st_size if log.is_file() else 0
        still = still + 1 if now == size and now > 7 else 0  # 7 bytes: its empty head
        size = now


def config_of(record: Record) -> dict[str, Any]:
    """The resolved config, and what the record rests on."""
    origin = {
        "key": record.key,
        "row": record.row,
        "commit": record.commit,
        "model_hash": record.model_hash,
        "image_set": record.images.get("hash"),
        "versions": record.versions,
    }
    return {**plain(record.config), "record": plain(origin)}


def summary_of(record: Record) -> dict[str, Any]:
    """Flat numbers: psnr, psnr/lo, psnr/hi, psnr/seen, …, budget/…, mean errors, seconds."""
    summary: dict[str, Any] = {}
    for name, entry in record.metrics.items():
        summary[name] = entry.get("value")
        summary[f"{name}/lo"], summary[f"{name}/hi"] = entry.get("lo"), entry.get("hi")
        for part in ("seen", "held_out"):
            if entry.get(part):
                summary[f"{name}/{part}"] = entry[part].get("value")
    summary.update({f"budget/{name}": value for name, value in record.budget.items()})
    for name in ("weight_error", "output_error"):
        values = [layer[name] for layer in record.layers if layer.get(name) is not None]
        summary[name] = sum(values) / len(values) if values else None
    summary.update({f"seconds/{name}": value for name, value in record.timings.items()})
    summary["n"] = len(record.images.get("names", ()))
    return {name: value for name, value in summary.items() if _shown(value)}


def _shown(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def _image_table(wandb: Any, record: Record, images: Sequence[TrackedImage]) -> Any:
    names = list(record.images.get("names", ()))
    metrics = [name for name, entry in record.metrics.items() if entry.get("per_image")]
    columns = ["name", "prompt", "image", "reference", *metrics]
    table = wandb.Table(columns=columns)
    for image in images[:IMAGES]:
        place = names.index(image.name) if image.name in names else None
        values = [
            None if place is None else _finite(record.metrics[name], place) for name in metrics
        ]
        shown = [
            None if path is None else wandb.Image(str(path))
            for path in (image.path, image.reference)
        ]
        table.add_data(image.name, image.prompt, *shown, *values)
    return table


def _finite(entry: Mapping[str, Any], place: int) -> float | None:
    value = entry["per_image"][place]
    return value if math.isfinite(value) else None
