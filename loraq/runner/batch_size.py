"""A batch size that fits: peak memory of two trial batches, and the line through them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loraq.compose import load_rows
from loraq.errors import LoraqError
from loraq.runner import embeddings
from loraq.runner.generate import image_batch
from loraq.runner.plan import check_rows, make_plan
from loraq.runner.rows import Stage
from loraq.runner.session import Session
from loraq.runner.stages import applied, quantize
from loraq.runner.store import Store
from loraq.utils.memory import free_bytes, held_bytes, peak

TRIALS = (1, 2)
STEPS = 2  # a second-order solver holds all it ever holds after two
SHARE = 0.9
GIB = 2**30


@dataclass(frozen=True)
class Fit:
    """What was measured, in bytes above the loaded model, and the batch that it speaks for."""

    peaks: Mapping[int, int]
    free: int
    size: int

    def text(self) -> str:
        trials = ", ".join(f"{top / GIB:.2f} GiB for {n}" for n, top in self.peaks.items())
        return (
            f"Peak above the loaded model: {trials}; {self.free / GIB:.1f} GiB free.\n"
            f"generate.batch_size={self.size} takes {SHARE:.0%} of that or less. Images depend on "
            "it only where products are not row-invariant, but keys always do: keep it for all "
            "rows that are compared."
        )


def largest(peaks: Mapping[int, int], free: int, most: int) -> int:
    """Batch size whose peak, on the line through two measured ones, is within SHARE of `free`."""
    (small, low), (large, high) = sorted(peaks.items())
    each = max((high - low) / (large - small), low / small / 4, 1.0)
    fixed = max(0.0, low - small * each)
    room = SHARE * free - fixed
    if room < each:
        raise LoraqError(
            f"One image needs {(fixed + each) / GIB:.2f} GiB beside the model, and "
            f"{free / GIB:.2f} GiB are free ({SHARE:.0%} of it are used at most). Take a smaller "
            "picture (model.height, model.width), model.dtype=bfloat16, or another machine."
        )
    return min(most, int(room / each))


def fit(overrides: Sequence[str], progress: bool = True) -> Fit:
    """Measure the last row that `overrides` describe; it is quantised first where it is not yet."""
    config = load_rows(overrides)[-1]
    store = Store(config.output)
    row = make_plan([config], store, last=Stage.QUANTIZED)[0]
    check_rows([row])
    session, model = Session(store, progress), replace(config.model, steps=STEPS)
    with session.using(row):
        packed = None if row.recipe is None else quantize(session, row)
        prompts = [row.prompts[place % len(row.prompts)] for place in range(max(TRIALS))]
        with tempfile.TemporaryDirectory() as folder:
            embeddings.write_embeddings(
                session.text_pipe(row), model, prompts, max(TRIALS), Path(folder), list
            )
            text = embeddings.read_embeddings(Path(folder), 0, row.device)
        pipe, peaks = session.pipe(row, text=False), {}
        with applied(packed, pipe.transformer, row.config.compute):
            before, free = held_bytes(row.device), free_bytes(row.device)
            for size in TRIALS:
                part = {name: tensor[:size] for name, tensor in text.items()}
                with peak(row.device) as found:
                    image_batch(pipe, model, prompts[:size], 0, embeddings=part)
                peaks[size] = found.top - before
    return Fit(peaks, free, largest(peaks, free, len(row.prompts)))
