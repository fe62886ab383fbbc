"""Writes W&B runs; the only file that imports wandb.

Where online is asked for and W&B does not answer, or falls silent before all has arrived, this run
and those after it are written offline, whole, for `wandb sync` to send: waiting again for every row
would cost an hour.
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
from typing import Any, cast

from loraq.errors import unknown
from loraq.results.record import Record, to_json
from loraq.results.tracking import contents
from loraq.results.tracking.contents import TrackedImage
from loraq.utils.hashing import key

MODES = ("offline", "online", "disabled")
DONE = "complete.txt"
PATIENCE = 30.0  # seconds for W&B to answer
UPLOAD = 600.0  # seconds for a run to arrive
FOLDERS = {"offline": ("offline-run", "run"), "online": ("run",)}
"""Mode → W&B's names for folders of runs that need not be written again."""


@dataclass(frozen=True)
class Run:
    """What identifies and describes a run; `logged` makes its tables with wandb's types.

    files: name → text, kept with the run as they are.
    """

    id: str
    name: str
    group: str
    job_type: str
    logged: Callable[[Any], dict[str, Any]]
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


class Tracker:
    """The runs of one experiment, under `folder`/wandb; a run that is there is not written again.

    Methods return the run's folder; None where tracking is disabled or failed (a warning says why).
    """

    def __init__(
        self, folder: str | os.PathLike[str], mode: str = "offline", project: str = "loraq"
    ) -> None:
        if mode not in MODES:
            raise unknown("tracking.mode", mode, MODES)
        self.folder, self.mode, self.project = Path(folder), mode, project

    def record(self, record: Record, images: Sequence[TrackedImage] = ()) -> Path | None:
        """One row: configuration, numbers, errors per layer, some images, and the whole record."""

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
                config=contents.config_of(record),
                summary=contents.summary_of(record),
                files={"record.json": to_json(record)},
                logged=logged,
            )
        )

    def overview(self, records: Sequence[Record], pictures: Sequence[Path] = ()) -> Path | None:
        """All rows beside one another: their table, quality against memory, the pictures."""

        def logged(wandb: Any) -> dict[str, Any]:
            columns, lines = contents.overview_rows(records)
            table = wandb.Table(columns=columns, data=lines)
            made: dict[str, Any] = {"rows": table}
            for metric in ("lpips", "psnr"):
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
                logged=logged,
            )
        )

    def _once(self, run: Run) -> Path | None:
        """Write the run unless it is there; several processes may want the same one."""
        from filelock import FileLock

        if self.mode == "disabled":
            return None
        try:
            (self.folder / "wandb").mkdir(parents=True, exist_ok=True)
            with FileLock(str(self.folder / "wandb" / f"{run.id}.lock")), _inside(self.folder):
                return written(run.id, self.folder, self.mode) or self._write(run)
        except Exception as error:
            warnings.warn(
                f"W&B run of {run.name!r} was not written ({type(error).__name__}: {error}); its "
                "record is safe. tracking.mode=disabled leaves W&B out",
                stacklevel=3,
            )
            return None

    def _write(self, run: Run) -> Path:
        _clear(run.id, self.folder)
        if self.mode == "online":
            try:
                return _write(run, self.folder, self.mode, self.project)
            except Exception as error:
                self.mode = "offline"
                _forget()
                _clear(run.id, self.folder)
                warnings.warn(
                    f"W&B does not answer ({type(error).__name__}: "
                    f"{str(error).strip().splitlines()[0]}); this run and the next are written "
                    f"offline. Later: wandb sync {self.folder / 'wandb'}/offline-run-*",
                    stacklevel=4,
                )
                if found := written(run.id, self.folder, self.mode):
                    return found
        return _write(run, self.folder, self.mode, self.project)


def written(run_id: str, folder: Path, mode: str) -> Path | None:
    """The folder of a complete run of this identity that serves the mode, if there is one."""
    found = [p for name in FOLDERS[mode] for p in folder.glob(f"wandb/{name}-*-{run_id}/{DONE}")]
    return max(found).parent if found else None


def _clear(run_id: str, folder: Path) -> None:
    """Remove what a killed or failed process left of this run, which a sync would send as well."""
    for name in FOLDERS["offline"]:
        for begun in folder.glob(f"wandb/{name}-*-{run_id}"):
            if not (begun / DONE).is_file():
                shutil.rmtree(begun, ignore_errors=True)


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


def _write(run: Run, folder: Path, mode: str, project: str) -> Path:
    import wandb

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
        mode=cast(Any, mode),
        reinit="create_new",
        settings=settings,
    )
    failed = 1
    try:
        for name, text in run.files.items():
            (Path(session.dir) / name).write_text(text, encoding="utf-8")
            session.save(str(Path(session.dir) / name), base_path=session.dir, policy="end")
        session.summary.update(run.summary)
        if tables := run.logged(wandb):
            session.log(tables)
        failed = 0
    finally:
        session.finish(exit_code=failed)
    path = Path(session.dir).parent
    if mode == "offline":
        _settle(path / f"run-{run.id}.wandb")
    (path / DONE).write_text(f"{run.id}\n", encoding="utf-8")
    return path


def _forget() -> None:
    """End W&B's service, which holds on to the identity of a run that could not begin."""
    import wandb

    wandb.teardown()


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


def _image_table(wandb: Any, record: Record, images: Sequence[TrackedImage]) -> Any:
    metrics, values = contents.image_values(record, [image.name for image in images])
    table = wandb.Table(columns=["name", "prompt", "image", "reference", *metrics])
    for image, numbers in zip(images, values, strict=True):
        shown = [
            None if path is None else wandb.Image(str(path))
            for path in (image.path, image.reference)
        ]
        table.add_data(image.name, image.prompt, *shown, *numbers)
    return table
