"""START HERE: the experiment, top to bottom.

    config → model → (calibrate) → quantise → generate → measure → record → table

An experiment is a list of rows; each row is one `Config`. What a row needs is decided from the
keys of its products (`plan.py`), made by the stages (`stages.py`) and kept in the store
(`store.py`), so that a finished product is never remade and an interrupted one goes on.

One experiment:  loraq run experiment=demo
Several GPUs:    torchrun --nproc-per-node 4 -m loraq.cli run experiment=demo
A sweep:         loraq sweep method=rtn,svdquant data.count=16,32   (python -m loraq.run --multirun)
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from loraq.activations import calibrate
from loraq.compose import CONF, load_rows
from loraq.errors import DiskFullError, LoraqError
from loraq.estimate import remaining
from loraq.keys import ACTIVATIONS, Row
from loraq.measuring import load_record, measure
from loraq.plan import check, make_plan, result_folder
from loraq.publish import Outcome, publish, summary
from loraq.results.record import Record
from loraq.stages import generate, quantise
from loraq.store import Store
from loraq.utils.console import duration
from loraq.workshop import Workshop


def run(overrides: Sequence[str], progress: bool = True) -> Outcome:
    """The whole experiment that `overrides` describe; returns its records and what was written."""
    started = time.perf_counter()
    configs = load_rows(overrides)
    store = Store(configs[0].output)
    rows = make_plan(configs, store)
    check(rows)

    work = Workshop(store, progress)
    finished: list[tuple[Row, Record]] = []
    failed: dict[str, Exception] = {}
    for number, row in enumerate(rows, 1):
        if progress:
            left = remaining(rows[number - 1 :], store)
            eta = f"  (about {duration(left)} left for all rows)" if left else "  (cached)"
            print(f"[{number}/{len(rows)}] {row.label}{eta}", file=sys.stderr, flush=True)
        try:
            with work.using(row):
                finished.append((row, run_row(work, row)))
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
        outcome = publish(work, finished, folder, started)
    else:  # one of several processes (torchrun, accelerate launch): the first one tells
        outcome = Outcome([record for _, record in finished], folder, "")
    if failed:
        reasons = "\n".join(f"  {name}: {error}" for name, error in failed.items())
        raise LoraqError(
            f"{len(failed)} of {len(rows)} rows failed:\n{reasons}\n"
            f"The others are in {outcome.folder}. The same command tries these again."
        )
    return outcome


def run_row(work: Workshop, row: Row) -> Record:
    """One row through all stages; what is finished is skipped."""
    for stage in ACTIVATIONS:
        if stage in row.todo:
            calibrate(work, row, stage)
    if "quantised" in row.todo:
        quantise(work, row)
    if "images" in row.todo:
        generate(work, row)
    if "record" in row.todo:
        return measure(work, row)
    return load_record(work.store, row)


def main() -> None:
    """Hydra's own entry point; its --multirun is `loraq sweep`."""
    multirun = {"--multirun", "-m"} & set(sys.argv[1:])
    if multirun:
        from loraq.sweep import launch
        from loraq.utils.console import reporting_errors

        with reporting_errors():
            print(launch([argument for argument in sys.argv[1:] if argument not in multirun]))
        return
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import DictConfig

    @hydra.main(version_base="1.3", config_path=str(Path(CONF).resolve()), config_name="config")
    def job(_composed: DictConfig) -> None:
        from loraq.utils.console import reporting_errors

        with reporting_errors():
            print(run(list(HydraConfig.get().overrides.task)).text)

    job()


if __name__ == "__main__":
    main()
