"""Save a row as a packed pipeline: a folder with a model card, to load with diffusers or upload."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from loraq.errors import LoraqError
from loraq.models.contents import check_contents
from loraq.quantization.model_card import write_card
from loraq.results.tables import main_table
from loraq.results.tables.text import to_markdown
from loraq.runner.evaluate import load_record
from loraq.runner.experiment import checked_rows, make_activations
from loraq.runner.rows import Row, Stage
from loraq.runner.stages import quantize_row
from loraq.runner.store import Store
from loraq.utils.disk_errors import reporting_disk_errors
from loraq.utils.files import temporary_name
from loraq.utils.process import first_process


def save_row(overrides: Sequence[str], folder: Path, progress: bool = True) -> str:
    """Save the one quantised row that `overrides` compose to `folder`; returns a line about it.

    Packed layers that exist are not made again; scores that were measured are in the card. Raises
    LoraqError before anything runs for several rows, none, or a folder with contents.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LoraqError(f"'{folder}' is not empty. Give a new folder, or delete its contents.")
    planned, session = checked_rows(overrides, progress, Stage.QUANTIZED)
    row = _only(planned)
    check_contents(row.config.model)  # all is saved; to quantise, the denoiser was enough
    with session.using(row):
        make_activations(session, row)
        model = quantize_row(session, row)
        made = f"{row.name}: {model.bits_per_weight:.3f} bits/weight"
        if not first_process():
            return f"{made}, saved by rank 0"
        pipe = session.pipe(row)
        with model.applied(pipe), reporting_disk_errors(folder):
            temporary = folder.absolute().parent / temporary_name()
            try:
                pipe.save_pretrained(temporary)
                write_card(pipe, temporary, _scores(session.store, row))
                os.replace(temporary, folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return f"{made}, saved to {folder}"


def _only(rows: Sequence[Row]) -> Row:
    quantized = [row for row in rows if row.recipe is not None]
    if len(quantized) != 1:
        names = ", ".join(row.name for row in quantized) or "none, only the 16-bit model"
        raise LoraqError(
            f"loraq save saves one quantised row, and these settings have {len(quantized)} "
            f"({names}). Add row=NAME to an experiment, or set method=NAME."
        )
    return quantized[0]


def _scores(store: Store, row: Row) -> str:
    """The table of the row's record; empty if it has not been measured."""
    if not store.finished(*row.product(Stage.RECORD)):
        return ""
    record = load_record(store, row)
    table = to_markdown(main_table([record])).rstrip()
    model = record.config["model"]["name"]
    return f"Of `{model}`, by LoRaQ's protocol; record `{record.key}`.\n\n{table}"
