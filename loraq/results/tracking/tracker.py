"""Writes W&B runs; the only module that imports wandb.

If W&B does not answer in mode online, or the upload does not finish, this run and all later ones
are written offline, to be sent by `wandb sync`. Waiting for each row again could take an hour.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from loraq.errors import unknown
from loraq.metrics.common.kinds import kind_of_file
from loraq.results.plots.still import still
from loraq.results.record import Record, to_json
from loraq.results.tables.columns import summary_metrics
from loraq.results.tracking import contents
from loraq.results.tracking.contents import TrackedImage
from loraq.utils.files import check_room, write_text
from loraq.utils.hashing import key
from loraq.utils.output_folder import file_lock
from loraq.utils.texts import first_line

Mode = Literal["offline", "online", "disabled"]
MODES: tuple[Mode, ...] = get_args(Mode)
DONE = "complete.txt"
PATIENCE = 30.0  # seconds to wait for an answer of W&B
UPLOAD = 600.0  # seconds to wait for the upload of a run
ROOM = 4 << 20  # bytes of a run without its pictures: logs, tables, the record
COPIES = 3  # of every picture on disk, at most: in the run, staged, and in W&B's cache
FOLDERS: dict[Mode, tuple[str, ...]] = {"offline": ("offline-run", "run"), "online": ("run",)}
"""Mode → prefixes of W&B's run folders in which a finished run counts for that mode."""


@dataclass(frozen=True)
class Run:
    """Identity and contents of a run.

    logged: builds the run's tables from the wandb module. files: name → text, stored with the run.
    pictures: image files that W&B copies into the run.
    """

    id: str
    name: str
    group: str
    job_type: str
    logged: Callable[[Any], dict[str, Any]]
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    pictures: Sequence[Path] = ()


class Tracker:
    """Writes the W&B runs of an experiment to `folder`/wandb, each one only once.

    Methods return the run's folder, or None if tracking is disabled or failed (with a warning).
    """

    def __init__(
        self, folder: str | os.PathLike[str], mode: str = "offline", project: str = "loraq"
    ) -> None:
        if mode not in MODES:
            raise unknown("tracking.mode", mode, MODES)
        self.folder, self.mode, self.project = Path(folder), mode, project

    def __repr__(self) -> str:
        return f"Tracker({str(self.folder)!r}, mode={self.mode!r}, project={self.project!r})"

    def record(self, record: Record, images: Sequence[TrackedImage] = ()) -> Path | None:
        """Write the run of a row: configuration, metrics, layer errors, some images, the record."""

        def logged(wandb: Any) -> dict[str, Any]:
            tables: dict[str, Any] = {}
            if record.layers:
                columns = list(contents.LAYER_COLUMNS)
                tables["layers"] = wandb.Table(columns=columns, data=contents.layer_rows(record))
            if images:
                tables["images"] = _image_table(wandb, record, images[: contents.IMAGES])
            return tables

        return self._once(
            Run(
                id=record.key,
                name=record.label or record.row,
                group=record.experiment,
                job_type=str(record.config.get("method") or record.row),
                config=contents.run_config(record),
                summary=contents.run_summary(record),
                files={"record.json": to_json(record)},
                pictures=[
                    path
                    for image in images[: contents.IMAGES]
                    for path in (image.path, image.reference)
                    if path is not None
                ],
                logged=logged,
            )
        )

    def overview(self, records: Sequence[Record], pictures: Sequence[Path] = ()) -> Path | None:
        """Write a run for all rows: their table, quality against memory, the pictures."""

        def logged(wandb: Any) -> dict[str, Any]:
            columns, lines = contents.overview_rows(records)
            table = wandb.Table(columns=columns, data=lines)
            made: dict[str, Any] = {"rows": table}
            for metric in reversed(summary_metrics(records)):
                if metric in columns:
                    title = f"{metric} against bits per weight"
                    made[f"pareto_{metric}"] = wandb.plot.scatter(
                        table, "bits_per_weight", metric, title=title
                    )
            return made | {path.stem: wandb.Image(str(path)) for path in pictures}

        experiment = records[0].experiment
        return self._once(
            Run(
                id=key([record.key for record in records]),
                name=f"{experiment}: all rows",
                group=experiment,
                job_type="overview",
                config={"records": {record.row: record.key for record in records}},
                pictures=pictures,
                logged=logged,
            )
        )

    def _once(self, run: Run) -> Path | None:
        """Write the run unless it exists; a lock lets several processes request the same run."""
        if self.mode == "disabled":
            return None
        try:
            (self.folder / "wandb").mkdir(parents=True, exist_ok=True)
            with (
                file_lock(self.folder / "wandb" / f"{run.id}.lock"),
                _wandb_folders(self.folder),
            ):
                return find_finished_run(run.id, self.folder, self.mode) or self._write(run)
        except Exception as error:
            warnings.warn(
                f"The W&B run of {run.name!r} was not written ({type(error).__name__}: {error}). "
                "Its record is safe. tracking.mode=disabled turns W&B off",
                stacklevel=3,
            )
            return None

    def _write(self, run: Run) -> Path:
        _clear(run.id, self.folder)
        # on a full disk W&B's service prints errors and tracebacks of its own, and then waits
        size = sum(path.stat().st_size for path in run.pictures)
        check_room(self.folder / "wandb", ROOM + COPIES * size)
        if self.mode == "online":
            try:
                return _write(run, self.folder, self.mode, self.project)
            except Exception as error:
                self.mode = "offline"
                _stop_service()
                _clear(run.id, self.folder)
                log = self.folder / "wandb" / "offline-run-*"
                warnings.warn(
                    f"W&B does not answer ({type(error).__name__}: "
                    f"{first_line(error)}); this run and all later ones "
                    f"are written offline. Send them with: wandb sync {log}",
                    stacklevel=4,
                )
                if found := find_finished_run(run.id, self.folder, self.mode):
                    return found
        return _write(run, self.folder, self.mode, self.project)


def find_finished_run(run_id: str, folder: Path, mode: Mode) -> Path | None:
    """Return the folder of the finished run with this id that counts for the mode, or None."""
    found = [p for name in FOLDERS[mode] for p in folder.glob(f"wandb/{name}-*-{run_id}/{DONE}")]
    return max(found).parent if found else None


def _clear(run_id: str, folder: Path) -> None:
    """Remove unfinished folders of this run, which `wandb sync` would also send."""
    for name in FOLDERS["offline"]:
        for begun in folder.glob(f"wandb/{name}-*-{run_id}"):
            if not (begun / DONE).is_file():
                shutil.rmtree(begun, ignore_errors=True)


@contextlib.contextmanager
def _wandb_folders(folder: Path) -> Iterator[None]:
    """Keep W&B's staged artefacts and caches under `folder`, where a later sync finds them.

    Environment variables set by the user take precedence; the others are removed afterwards.
    """
    variables = {"WANDB_DATA_DIR": "data", "WANDB_CACHE_DIR": "cache"}
    unset = {name: place for name, place in variables.items() if name not in os.environ}
    for name, place in unset.items():
        os.environ[name] = str(folder.resolve() / "wandb" / place)
    try:
        yield
    finally:
        for name in unset:
            os.environ.pop(name, None)


def _write(run: Run, folder: Path, mode: Mode, project: str) -> Path:
    import wandb  # heavy

    settings = wandb.Settings(
        silent=True,
        console="off",
        x_disable_stats=True,
        x_disable_meta=True,
        disable_git=True,
        init_timeout=PATIENCE,
        finish_timeout=UPLOAD,
        finish_timeout_raises=True,
    )
    session = wandb.init(
        project=project,
        id=run.id,
        name=run.name,
        group=run.group,
        job_type=run.job_type,
        config=run.config,
        dir=str(folder),
        mode=mode,
        reinit="create_new",
        settings=settings,
    )
    failed = 1
    try:
        for name, text in run.files.items():
            write_text(Path(session.dir) / name, text)
            session.save(str(Path(session.dir) / name), base_path=session.dir, policy="end")
        session.summary.update(run.summary)
        if tables := run.logged(wandb):
            session.log(tables)
        failed = 0
    finally:
        session.finish(exit_code=failed)
    path = Path(session.dir).parent
    if mode == "offline":
        _wait_for_log(path / f"run-{run.id}.wandb")
    write_text(path / DONE, f"{run.id}\n")
    return path


def _stop_service() -> None:
    """Stop W&B's service, which otherwise keeps the id of a run that could not start."""
    import wandb  # heavy

    wandb.teardown()


def _wait_for_log(log: Path, patience: float = 60.0, pause: float = 0.1) -> None:
    """Wait until the run's log is on disk: W&B's service still writes it after `finish`."""
    deadline, size, unchanged = time.monotonic() + patience, -1, 0
    while unchanged < 3:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{log.name} was not written within {patience:g} s")
        time.sleep(pause)
        now = log.stat().st_size if log.is_file() else 0
        unchanged = unchanged + 1 if now == size and now > 7 else 0  # an empty log has 7 bytes
        size = now


def _image_table(wandb: Any, record: Record, images: Sequence[TrackedImage]) -> Any:
    metrics, values = contents.image_values(record, [image.name for image in images])
    table = wandb.Table(columns=["name", "prompt", "image", "reference", *metrics])
    for image, numbers in zip(images, values, strict=True):
        shown = [
            None if path is None else _shown(wandb, path) for path in (image.path, image.reference)
        ]
        table.add_data(image.name, image.prompt, *shown, *numbers)
    return table


def _shown(wandb: Any, path: Path) -> Any:
    """An image as it is, frames of a video in a strip, a clip of sound to be played."""
    kind = kind_of_file(path)
    if kind == "audio":
        return wandb.Audio(str(path))
    return wandb.Image(still(path) if kind == "video" else str(path))
