"""What the stages share: store, pipeline (loaded when it is first needed), bars, timings."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from loraq.models import Layer, list_layers, load_pipeline
from loraq.models.loading import mapped_transformer, remap
from loraq.plan import Row
from loraq.store import Store, disk_error


class Workshop:
    """The store, the loaded pipeline, and how long each kind of work took in this process."""

    def __init__(self, store: Store, progress: bool = True) -> None:
        self.store = store
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self._loaded: tuple[Any, Any] | None = None
        self._mapped: tuple[Any, Any] | None = None

    def pipe(self, row: Row) -> Any:
        """The row's pipeline; the last one is kept."""
        wanted = _identity(row)
        if self._loaded is None or self._loaded[0] != wanted:
            self._loaded = None
            with self.timed("load the model"):
                self._loaded = (wanted, load_pipeline(row.config.model, row.device))
        return self._loaded[1]

    def transformer(self, row: Row) -> Any:
        """The 16-bit transformer for quantising: a data-free recipe on a CPU needs no pipeline."""
        wanted = _identity(row)
        calibrated = row.recipe is None or row.recipe.needs_calibration
        if calibrated or row.device != "cpu" or (self._loaded and self._loaded[0] == wanted):
            return self.pipe(row).transformer
        if self._mapped is None or self._mapped[0] != wanted:
            with self.timed("load the model"):
                self._mapped = (wanted, mapped_transformer(row.config.model))
        return self._mapped[1]

    def release(self, row: Row) -> Callable[[], None] | None:
        """What lets go of the weights that quantising has read, where they are mapped."""
        transformer = self.transformer(row)
        if self._mapped is None or transformer is not self._mapped[1]:
            return None
        return functools.partial(remap, transformer, row.config.model)

    def layers(self, row: Row, skip: Sequence[str] | None) -> list[Layer]:
        return list_layers(self.transformer(row), row.config.model.family, skip)

    def bar(self, text: str) -> str | None:
        return f"  {text}" if self.progress else None

    @contextlib.contextmanager
    def timed(self, work: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            self.seconds[work] = self.seconds.get(work, 0.0) + spent

    def each(self, items: Sequence[Any], text: str, unit: str) -> Any:
        """`items` with a progress bar that goes away when they are done."""
        from tqdm import tqdm

        return tqdm(items, desc=self.bar(text), unit=unit, disable=not self.progress, leave=False)


def _identity(row: Row) -> tuple[Any, ...]:
    return row.model_hash, row.config.model, row.device


@contextlib.contextmanager
def full_disk_is_ours(path: Path) -> Iterator[None]:
    """safetensors reports a full disk as its own error; here it is ours."""
    try:
        yield
    except Exception as error:
        if "No space left" in str(error):
            raise disk_error(OSError(28, str(error)), path) from error
        raise
