"""START HERE: the experiment, top to bottom.

    config → model → (calibrate) → quantise → generate → measure → record → table

An experiment is a list of rows; each row is one `Config`. The keys of a row's products
(`product_keys.py`) decide what is to be made (`plan.py`). The stages make it (`stages.py`), the
store keeps it (`store.py`): a finished product is never made again, an interrupted one is resumed.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Sequence

from loraq.compose import load_rows
from loraq.errors import DiskFullError, LoraqError
from loraq.results.record import Record
from loraq.runner.calibrate import calibrate
from loraq.runner.estimate import remaining
from loraq.runner.evaluate import load_record, measure
from loraq.runner.plan import check, make_plan
from loraq.runner.product_keys import ACTIVATIONS, Row
from loraq.runner.publish import Outcome, publish, summary
from loraq.runner.result_folder import result_folder
from loraq.runner.session import Session
from loraq.runner.stages import generate, quantise
from loraq.runner.store import Store
from loraq.utils.console import duration


def run(overrides: Sequence[str], progress: bool = True) -> Outcome:
    """The whole experiment that `overrides` describe; returns its records and what was written."""
    started = time.perf_counter()
    configs = load_rows(overrides)
    store = Store(configs[0].output)
    rows = make_plan(configs, store)
    check(rows)

    session = Session(store, progress)
    finished: list[tuple[Row, Record]] = []
    failed: dict[str, Exception] = {}
    for number, row in enumerate(rows, 1):
        if progress:
            left = remaining(rows[number - 1 :], store)
            eta = f"  (about {duration(left)} left for all rows)" if left else "  (cached)"
            print(f"[{number}/{len(rows)}] {row.label}{eta}", file=sys.stderr, flush=True)
        try:
            with session.using(row):
                finished.append((row, run_row(session, row)))
        except LoraqError as error:
            if row.recipe is None or isinstance(error, DiskFullError):
                raise
            failed[row.name] = error
            print(f"loraq: row '{row.name}' failed: {error}", file=sys.stderr)
            continue
        except Exception as error:  # a fault of ours: the other rows need not suffer
            if row.recipe is None:
                raise
            failed[row.name] = error
            print(f"loraq: row '{row.name}' failed, by a fault of ours:", file=sys.stderr)
            traceback.print_exc()
            continue
        if progress:
            print(f"  {summary(finished[-1][1])}", file=sys.stderr, flush=True)

    folder = result_folder(rows, overrides)
    if os.environ.get("RANK", "0") == "0":
        outcome = publish(session, finished, folder, started)
    else:  # one of several processes (torchrun, accelerate launch): the first one tells
        outcome = Outcome([record for _, record in finished], folder, "")
    if failed:
        reasons = "\n".join(f"  {name}: {error}" for name, error in failed.items())
        raise LoraqError(
            f"{len(failed)} of {len(rows)} rows failed:\n{reasons}\n"
            f"The others are in {outcome.folder}. The same command tries these again."
        )
    return outcome


def run_row(session: Session, row: Row) -> Record:
    """One row through all stages; what is finished is skipped."""
    for stage in ACTIVATIONS:
        if stage in row.todo:
            calibrate(session, row, stage)
    if "quantised" in row.todo:
        quantise(session, row)
    if "images" in row.todo:
        generate(session, row)
    if "record" in row.todo:
        return measure(session, row)
    return load_record(session.store, row)
