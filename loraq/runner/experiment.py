"""START HERE: the experiment, top to bottom.

    config → model → (calibrate) → quantise → generate → measure → record → table

An experiment is a list of rows; each row is one `Config`. The keys of a row's products
(`product_keys.py`) determine which products are missing (`plan.py`). The stages (`stages.py`) make
them and the store (`store.py`) keeps them: a finished product is never made again, an interrupted
one is resumed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from loraq.compose import load_rows
from loraq.errors import DiskFullError, LoraqError
from loraq.metrics.common.fetch import fetch_weights
from loraq.results.record import Record
from loraq.runner.calibrate import calibrate_row
from loraq.runner.estimate import Remaining
from loraq.runner.evaluate import load_record, measure_row
from loraq.runner.notes import model_notes
from loraq.runner.plan import check_rows, plan_rows, to_measure, weights_to_fetch
from loraq.runner.publish import Outcome, publish_results, row_summary
from loraq.runner.result_folder import result_folder
from loraq.runner.rows import ACTIVATIONS, Row, Stage
from loraq.runner.session import Session
from loraq.runner.stages import generate_row, quantize_row
from loraq.runner.store import Store
from loraq.utils.console import duration, show_messages
from loraq.utils.disk_errors import reporting_disk_errors
from loraq.utils.failures import report_fault
from loraq.utils.process import first_process

log = logging.getLogger(__name__)


def run(overrides: Sequence[str], progress: bool = True) -> Outcome:
    """Run the experiment that `overrides` compose, and return its records and the result folder.

    progress: show progress bars, and a line before and after every row. Raises LoraqError if any
    row failed, after all others have finished.
    """
    started = time.perf_counter()
    rows, session = checked_rows(overrides, progress)
    finished: list[tuple[Row, Record]] = []
    failed: dict[str, BaseException] = {}
    remaining = Remaining(rows if progress else [], session.store)
    for number, row in enumerate(rows, 1):
        if progress:
            seconds = remaining.seconds(number - 1)
            eta = f"about {duration(seconds)} left for all rows" if seconds else "cached"
            log.info("[%d/%d] %s  (%s)", number, len(rows), row.label, eta)
        try:
            with session.using(row), reporting_disk_errors(session.store.root):
                finished.append((row, run_row(session, row)))
        except LoraqError as error:
            if row.recipe is None or isinstance(error, DiskFullError):
                raise  # every other row would fail for the same reason
            failed[row.name] = error
            log.error("row '%s' failed: %s", row.name, error)
            continue
        except (Exception, SystemExit) as error:  # a fault, here or in a module that calls sys.exit
            if row.recipe is None and isinstance(error, Exception):
                raise
            failed[row.name] = error
            report_fault(error, f"row '{row.name}'")
            continue
        if progress:
            log.info("  %s", row_summary(finished[-1][1]))

    folder = result_folder(rows, overrides)
    if first_process():
        outcome = publish_results(session, finished, folder, started)
    else:
        outcome = Outcome([record for _, record in finished], folder, "")
    if failed:
        reasons = "\n".join(f"  {name}: {error}" for name, error in failed.items())
        raise LoraqError(
            f"{len(failed)} of {len(rows)} rows failed:\n{reasons}\n"
            f"The other rows are in {outcome.folder}. Run the same command again to retry the "
            "failed rows."
        )
    return outcome


def checked_rows(
    overrides: Sequence[str], progress: bool, last: Stage = Stage.RECORD
) -> tuple[list[Row], Session]:
    """The planned rows that `overrides` compose, checked before anything runs, and a session.

    Missing weights of metrics are downloaded here, as those of a hub model are.
    """
    show_messages()
    configs = load_rows(overrides)
    session = Session(Store(configs[0].output), progress)
    rows = plan_rows(configs, session.store, last)
    check_rows(rows)
    for note in model_notes(row.config.model for row in rows if progress and row.todo):
        log.info("%s", note)
    if missing := weights_to_fetch(to_measure(rows)):
        fetch_weights(missing, log.info, progress)
    return rows, session


def make_activations(session: Session, row: Row) -> None:
    """Run the 16-bit model for the activations that the row still needs."""
    for stage in ACTIVATIONS:
        if stage in row.todo:
            calibrate_row(session, row, stage)


def run_row(session: Session, row: Row) -> Record:
    """Run all stages that the row still needs, and return its record."""
    make_activations(session, row)
    if Stage.QUANTIZED in row.todo:
        quantize_row(session, row)
    if Stage.IMAGES in row.todo:
        generate_row(session, row)
    if Stage.RECORD in row.todo:
        return measure_row(session, row)
    return load_record(session.store, row)


def run_until(
    last: Stage, overrides: Sequence[str], progress: bool, show: Callable[[str], None]
) -> None:
    """Run every row up to stage `last`, without metrics.

    last: `Stage.QUANTIZED` or `Stage.IMAGES`. show: called with each line of output.
    """
    rows, session = checked_rows(overrides, progress, last)
    for row in rows:
        with session.using(row):
            make_activations(session, row)
            if Stage.QUANTIZED in row.todo:
                model = quantize_row(session, row)
                memory = f"{model.bits_per_weight:.3f} bits/weight, rank {model.rank_range}"
                show(f"{row.name}: {memory}")
            if Stage.IMAGES in row.todo:
                generate_row(session, row)
        if last in row.keys:
            show(f"{row.name}: {session.store.path(*row.product(last))}")
