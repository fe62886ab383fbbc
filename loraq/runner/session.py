"""What the stages share: store, pipeline (loaded when it is first needed), bars, timings."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from loraq.models.layers import Layer, list_layers
from loraq.models.loading import load_pipeline
from loraq.models.mapped import mapped_transformer, remap, runs_as_stored
from loraq.runner.rows import Row
from loraq.runner.store import Store

TEXT, IMAGE = ("text_encoder", "tokenizer"), ("transformer", "vae")


class Session:
    """The store, the loaded pipeline, and how long each kind of work took in this process."""

    def __init__(self, store: Store, progress: bool = True) -> None:
        self.store = store
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self._loaded: tuple[Any, Any] | None = None
        self._mapped: tuple[Any, Any] | None = None

    def pipe(self, row: Row, text: bool = True) -> Any:
        """The row's pipeline, the last one is kept; without its text encoder unless `text`."""
        wanted, loaded = _identity(row), self._loaded
        if loaded is None or loaded[0] != wanted or (text and loaded[1].text_encoder is None):
            self._loaded = loaded = None
            with self.timed("load the model"):
                loaded = (wanted, self._load(row, () if text else TEXT))
            self._loaded = loaded
        if not text:
            loaded[1].register_modules(**dict.fromkeys(TEXT))
        return loaded[1]

    def text_pipe(self, row: Row) -> Any:
        """The row's pipeline as far as it encodes prompts; not kept, unless it is loaded whole."""
        loaded = self._loaded
        if loaded is not None and loaded[0] == _identity(row) and loaded[1].text_encoder:
            return loaded[1]
        with self.timed("load the model"):
            return self._load(row, IMAGE)

    def _load(self, row: Row, without: Sequence[str]) -> Any:
        """On a CPU a transformer that runs as it is stored stays in its files."""
        given = {}
        if (
            row.device == "cpu"
            and "transformer" not in without
            and runs_as_stored(row.config.model)
        ):
            given["transformer"] = self._map(row)
        import loraq.diffusers_quantizer  # noqa: F401 (packed transformers load as well)

        return load_pipeline(row.config.model, row.device, without, **given)

    def transformer(self, row: Row) -> Any:
        """The 16-bit transformer for quantising, which needs no pipeline on a CPU."""
        if self._loaded is not None and self._loaded[0] == _identity(row):
            return self._loaded[1].transformer
        if row.recipe is None or row.device != "cpu":
            return self.pipe(row, text=False).transformer
        with self.timed("load the model"):
            return self._map(row)

    def _map(self, row: Row) -> Any:
        if self._mapped is None or self._mapped[0] != _identity(row):
            self._mapped = (_identity(row), mapped_transformer(row.config.model))
        return self._mapped[1]

    def release(self, row: Row) -> Callable[[], None] | None:
        """What lets go of the weights that quantising has read, where they are mapped."""
        transformer = self.transformer(row)
        if self._mapped is None or transformer is not self._mapped[1]:
            return None
        return functools.partial(remap, transformer, row.config.model)

    def layers(self, row: Row, skip: Sequence[str] | None) -> list[Layer]:
        return list_layers(self.transformer(row), row.config.model.family, skip)

    @contextlib.contextmanager
    def using(self, row: Row) -> Iterator[None]:
        """The row's threads, and this process's GPU, while the block runs.

        torchrun and accelerate launch number a machine's processes: LOCAL_RANK is the GPU's number.
        """
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(row.threads)
        if row.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        try:
            yield
        finally:
            torch.set_num_threads(before)

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
