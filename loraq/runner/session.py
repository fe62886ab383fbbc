"""State that the stages share: store, pipeline (loaded on first use), progress bars, timings."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from loraq.models.call import embedding_names, encodes_apart
from loraq.models.denoisers import denoiser_of, parts, same_parts
from loraq.models.hollow import hollow_parts
from loraq.models.layers import Layer, list_layers
from loraq.models.loading import denoisers_in, image_parts, load_pipeline, text_parts
from loraq.models.mapped import mapped_transformer, remap, runs_as_stored
from loraq.models.source import pipeline_of
from loraq.quantization.model import QuantizedModel
from loraq.runner.other_gpus import note_gpu
from loraq.runner.rows import Row
from loraq.runner.store import Store
from loraq.utils.output_folder import check_output_folder
from loraq.utils.process import own_gpu, several_machines, torch_threads

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn

T = TypeVar("T")


class Session:
    """The store, the loaded pipeline, and the seconds per kind of work in this process.

    packed: key and packed layers that `stages.quantize_row` read last.

    Raises LoraqError if the output folder is unfit (`check_output_folder`).
    """

    def __init__(self, store: Store, progress: bool = True) -> None:
        check_output_folder(store.root, several_machines())
        self.store = store
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self.packed: tuple[str, QuantizedModel] | None = None
        self._loaded: tuple[Any, Any] | None = None
        self._mapped: tuple[Any, Any] | None = None

    def __repr__(self) -> str:
        loaded = None if self._loaded is None else type(self._loaded[1]).__name__
        return f"Session({self.store!r}, loaded={loaded}, {sum(self.seconds.values()):.0f} s)"

    def pipe(self, row: Row, text: bool = True) -> DiffusionPipeline:
        """The row's pipeline, without its text encoders unless `text`; the last stays loaded.

        One that does not encode its prompts apart keeps them.
        """
        wanted, loaded = _identity(row), self._loaded
        encoders = text_parts(row.config.model)
        text = text or not encodes_apart(pipeline_of(row.config.model))
        if loaded is None or loaded[0] != wanted or (text and not _holds(loaded[1], encoders)):
            self._loaded = loaded = None
            with self.timed("load the model"):
                loaded = (wanted, self._load(row, () if text else encoders))
            self._loaded = loaded
        if not text:
            loaded[1].register_modules(**dict.fromkeys(encoders))
        return loaded[1]

    def text_pipe(self, row: Row) -> DiffusionPipeline:
        """The row's pipeline to encode prompts; not kept unless loaded completely.

        It has no denoisers and decoders, or hollow ones if its own call is to be recorded.
        """
        loaded, model = self._loaded, row.config.model
        kept = loaded is not None and loaded[0] == _identity(row)
        if loaded is not None and kept and _holds(loaded[1], text_parts(model)):
            return loaded[1]
        pipeline = pipeline_of(model)
        if not encodes_apart(pipeline):
            return self.pipe(row)
        with self.timed("load the model"):
            if embedding_names(pipeline, model):
                return self._load(row, image_parts(model))
            return load_pipeline(model, row.device, **hollow_parts(model, row.device))

    def _load(self, row: Row, without: Sequence[str]) -> DiffusionPipeline:
        """Load the pipeline; on a CPU, denoisers are memory-mapped if their dtype allows it."""
        given: dict[str, nn.Module] = {}
        model = row.config.model
        names = denoisers_in(model)
        if row.device == "cpu" and not {*names} & {*without} and runs_as_stored(model):
            given = dict(zip(names, parts(self._map(row)).values(), strict=True))
        # registers the packed format with diffusers, which is imported only to load a model
        import loraq.diffusers_quantizer  # noqa: F401

        return load_pipeline(model, row.device, without, **given)

    def denoiser(self, row: Row) -> nn.Module:
        """What is quantised, in 16 bits; on a CPU it is memory-mapped, without a pipeline."""
        if self._loaded is not None and self._loaded[0] == _identity(row):
            return denoiser_of(self._loaded[1])
        if row.recipe is None or row.device != "cpu":
            return denoiser_of(self.pipe(row, text=False))
        with self.timed("load the model"):
            return self._map(row)

    def _map(self, row: Row) -> nn.Module:
        if self._mapped is None or self._mapped[0] != _identity(row):
            self._mapped = (_identity(row), mapped_transformer(row.config.model))
        return self._mapped[1]

    def release(self, row: Row) -> Callable[[], None] | None:
        """A function that unmaps the weights that were read; None if none are mapped."""
        denoiser = self.denoiser(row)
        if self._mapped is None or not same_parts(denoiser, self._mapped[1]):
            return None
        return functools.partial(remap, denoiser, row.config.model)

    def layers(self, row: Row, skip: Sequence[str] | None) -> list[Layer]:
        """The layers of the row's denoiser except those that match `skip`."""
        return list_layers(self.denoiser(row), row.config.model.family, skip)

    @contextlib.contextmanager
    def using(self, row: Row) -> Iterator[None]:
        """The row's thread count and this process's GPU are set while the block runs."""
        if row.arithmetic is not None:
            note_gpu(self.store, row.arithmetic)
        with torch_threads(row.threads), own_gpu(row.device):
            yield

    def bar(self, text: str) -> str | None:
        """The label of a progress bar; None if bars are off."""
        return f"  {text}" if self.progress else None

    @contextlib.contextmanager
    def timed(self, work: str) -> Iterator[None]:
        """Add the time of the block to `seconds[work]`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            self.seconds[work] = self.seconds.get(work, 0.0) + spent

    def each(self, items: Sequence[T], text: str, unit: str) -> Iterable[T]:
        """Iterate over `items` with a progress bar that disappears at the end."""
        from tqdm import tqdm

        bar: Iterable[T] = tqdm(
            items, desc=self.bar(text), unit=unit, disable=not self.progress, leave=False
        )
        return bar


def _holds(pipe: Any, names: Sequence[str]) -> bool:
    return all(getattr(pipe, name, None) is not None for name in names)


def _identity(row: Row) -> tuple[Any, ...]:
    return row.model_hash, row.config.model, row.device
