"""The largest batch size that fits into memory, from the peak memory of two trial batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from loraq.compose import load_rows
from loraq.errors import LoraqError
from loraq.models.denoisers import denoiser_of
from loraq.runner import embeddings
from loraq.runner.generate import image_batch
from loraq.runner.plan import check_rows, plan_rows
from loraq.runner.rows import Stage
from loraq.runner.session import Session
from loraq.runner.stages import applied, quantize_row
from loraq.runner.store import Store
from loraq.utils.memory import free_bytes, held_bytes, peak

TRIALS = (1, 2)
STEPS = 2  # a second-order solver reaches its peak memory in the second step
SHARE = 0.9  # of the free memory that a batch may use
GIB = 2**30


@dataclass(frozen=True)
class BatchSizeFit:
    """Peaks by batch size and free memory, in bytes above the loaded model; `size`: the result."""

    peaks: Mapping[int, int]
    free: int
    size: int

    def text(self) -> str:
        trials = ", ".join(f"{top / GIB:.2f} GiB for {n}" for n, top in self.peaks.items())
        return (
            f"Peak above the loaded model: {trials}; {self.free / GIB:.1f} GiB free.\n"
            f"generate.batch_size={self.size} takes {SHARE:.0%} of that or less. The batch size is "
            "part of the images' keys (and changes images if matrix products are not "
            "row-invariant): use the same one for all rows that are compared."
        )


def largest_batch(peaks: Mapping[int, int], free: int, most: int) -> int:
    """Largest batch size, at most `most`, whose linearly extrapolated peak is ≤ SHARE·free."""
    (small, low), (large, high) = sorted(peaks.items())
    each = max((high - low) / (large - small), low / small / 4, 1.0)
    fixed = max(0.0, low - small * each)
    room = SHARE * free - fixed
    if room < each:
        raise LoraqError(
            f"One image needs {(fixed + each) / GIB:.2f} GiB in addition to the model; "
            f"{free / GIB:.2f} GiB are free (at most {SHARE:.0%} of them are used). Set a smaller "
            "image size (model.height, model.width) or model.dtype=bfloat16, or use a machine "
            "with more memory."
        )
    return min(most, int(room / each))


def fit_batch_size(overrides: Sequence[str], progress: bool = True) -> BatchSizeFit:
    """Measure the last row that `overrides` compose; quantises it first if necessary."""
    config = load_rows(overrides)[-1]
    session, model = Session(Store(config.output), progress), replace(config.model, steps=STEPS)
    row = plan_rows([config], session.store, last=Stage.QUANTIZED)[0]
    check_rows([row])
    with session.using(row):
        packed = None if row.recipe is None else quantize_row(session, row)
        prompts = [row.prompts[place % len(row.prompts)] for place in range(max(TRIALS))]
        encoder, text = session.text_pipe(row), {}
        for size in TRIALS:
            text[size] = embeddings.encode_batch(encoder, model, prompts[:size])
        del encoder
        pipe, peaks = session.pipe(row, text=False), {}
        with applied(packed, denoiser_of(pipe), row.config.compute):
            before, free = held_bytes(row.device), free_bytes(row.device)
            for size in TRIALS:
                with peak(row.device) as found:
                    image_batch(pipe, model, prompts[:size], 0, embeddings=text[size])
                peaks[size] = found.top - before
    return BatchSizeFit(peaks, free, largest_batch(peaks, free, len(row.prompts)))
