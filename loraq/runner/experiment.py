"""START HERE: the experiment, top to bottom.

    config → model → (calibrate) → quantise → generate → measure → record → table

An experiment is a list of rows; each row is one `Config`. The keys of a row's products
(`product_keys.py`) decide what is to be made (`plan.py`). The stages make it (`stages.py`), the
store keeps it (`store.py`): a finished product is never made again, an interrupted one is resumed.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence

from loraq.compose import load_rows
from loraq.errors import DiskFullError, LoraqError
from loraq.results.record import Record
from loraq.runner.calibrate import calibrate
from loraq.runner.estimate import remaining
from loraq.runner.evaluate import load_record, measure
from loraq.runner.plan import check_rows, make_plan
from loraq.runner.publish import Outcome, publish, summary
from loraq.runner.result_folder import result_folder
from loraq.runner.rows import ACTIVATIONS, Row, Stage
from loraq.runner.session import Session
from loraq.runner.stages import generate, quantize
from loraq.runner.store import Store
from loraq.utils.console import duration, show_messages

log = logging.getLogger(__name__)


def run(overrides: Sequence[str], progress: bool = True) -> Outcome:
    """Run the experiment that `overrides` describe; returns its records and what was written.

    progress: show bars, and a line before and after every row.
    """
    started = time.perf_counter()
    show_messages()
    configs = load_rows(overrides)
    store = Store(configs[0].output)
    rows = make_plan(configs, store)
    check_rows(rows)

    session = Session(store, progress)
    finished: list[tuple[Row, Record]] = []
    failed: dict[str, Exception] = {}
    for number, row in enumerate(rows, 1):
        if progress:
            left = remaining(rows[number - 1 :], store)
            eta = f"about {duration(left)} left for all rows" if left else "cached"
            log.info("[%d/%d] %s  (%s)", number, len(rows), row.label, eta)
        try:
            with session.using(row):
                finished.append((row, run_row(session, row)))
        except LoraqError as error:
            if row.recipe is None or isinstance(error, DiskFullError):
                raise  # every other row would fail for the same reason
            failed[row.name] = error
            log.error("row '%s' failed: %s", row.name, error)
            continue
        except Exception as error:  # internal error: go on with the other rows
            if row.recipe is None:
                raise
            failed[row.name] = error
            log.exception("row '%s' failed with an internal error (please report):", row.name)
            continue
        if progress:
            log.info("  %s", summary(finished[-1][1]))

    folder = result_folder(rows, overrides)
    if os.environ.get("RANK", "0") == "0":
        outcome = publish(session, finished, folder, started)
    else:  # one of several processes (torchrun, accelerate launch): the first one publishes
        outcome = Outcome([record for _, record in finished], folder, "")
    if failed:
        reasons = "\n".join(f"  {name}: {error}" for name, error in failed.items())
        raise LoraqError(
            f"{len(failed)} of {len(rows)} rows failed:\n{reasons}\n"
            f"The others are in {outcome.folder}. The same command tries these again."
        )
    return outcome


def run_row(session: Session, row: Row) -> Record:
    """Take one row through all stages; finished stages are skipped."""
    for stage in ACTIVATIONS:
        if stage in row.todo:
            calibrate(session, row, stage)
    if Stage.QUANTIZED in row.todo:
        quantize(session, row)
    if Stage.IMAGES in row.todo:
        generate(session, row)
    if Stage.RECORD in row.todo:
        return measure(session, row)
    return load_record(session.store, row)


def run_until(
    last: Stage, overrides: Sequence[str], progress: bool, show: Callable[[str], None]
) -> None:
    """The stages up to packed layers or images, for every row, without metrics.

    last: `Stage.QUANTIZED` or `Stage.IMAGES`. show: called with each line of the outcome.
    """
    show_messages()
    configs = load_rows(overrides)
    store = Store(configs[0].output)
    rows = make_plan(configs, store, last)
    check_rows(rows)
    session = Session(store, progress)
    for row in rows:
        with session.using(row):
            for stage in ACTIVATIONS:
                if stage in row.todo:
                    calibrate(session, row, stage)
            if Stage.QUANTIZED in row.todo:
                model = quantize(session, row)
                ranks = "–".join(map(str, dict.fromkeys((model.ranks[0], model.ranks[-1]))))
                show(f"{row.name}: {model.bits_per_weight:.3f} bits/weight, rank {ranks}")
            if Stage.IMAGES in row.todo:
                generate(session, row)
        if last in row.keys:
            show(f"{row.name}: {store.path(*row.product(last))}")
