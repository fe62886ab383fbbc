"""One job of a sweep, in the process that a launcher started for it.

It never raises, because an exception would stop other jobs. `job_N.json` contains the status and is
written at the start and at the end. A running job holds `job_N.lock`; if the lock is free and the
status is "running", the process has died.
"""

from __future__ import annotations

import datetime
import logging
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from loraq.compose import load_rows
from loraq.errors import LoraqError
from loraq.results.record import checkout_commit
from loraq.runner.experiment import run
from loraq.runner.publish import row_summary
from loraq.runner.sweep import jobs
from loraq.utils.console import show_messages
from loraq.utils.disk_errors import reporting_disk_errors
from loraq.utils.failures import report_fault
from loraq.utils.files import write_json
from loraq.utils.output_folder import file_lock

log = logging.getLogger(__name__)


def status_file(folder: Path, number: int) -> Path:
    """The JSON file with the status of job `number`."""
    return folder / f"job_{number}.json"


def lock_file(folder: Path, number: int) -> Path:
    """The lock that job `number` holds while it runs."""
    return folder / f"job_{number}.lock"


def run_job(folder: Path, number: int) -> None:
    """Run job `number` of the plan in `folder` and write its status file."""
    show_messages()
    started = time.time()
    status: dict[str, Any] = {"state": "running", "host": socket.gethostname(), "pid": os.getpid()}
    status["started"] = started
    with file_lock(lock_file(folder, number)):
        write_json(status_file(folder, number), status)
        try:
            with reporting_disk_errors(folder):
                status |= _run_checked(jobs.read_sweep_plan(folder), number)
        except LoraqError as error:
            status |= {"state": "failed", "error": str(error)}
        except (Exception, SystemExit) as error:
            report_fault(error, f"job {number}")
            status |= {"state": "failed", "error": f"internal error: {error!r}"}
        status["seconds"] = time.time() - started
        write_json(status_file(folder, number), status)
    if "error" in status:
        log.error("job %d failed: %s", number, status["error"])


def _run_checked(plan: jobs.Plan, number: int) -> dict[str, Any]:
    """Run the job, or raise LoraqError if code or configuration differ from the plan."""
    os.chdir(plan.folder)
    job = plan.jobs[number]
    if (code := jobs.code_hash()) != plan.code:
        now = checkout_commit() or "no commit"
        raise LoraqError(
            f"this job was submitted with other code (commit {plan.commit or 'unknown'}, source "
            f"{plan.code}) than is installed now ({now}, source {code}). Check out the old code "
            "and run the failed jobs again, or start a new sweep."
        )
    if jobs.config_hash(load_rows(job.overrides)) != job.config:
        raise LoraqError(
            "this job was submitted with another configuration than its overrides compose now. "
            "Start a new sweep."
        )
    started = datetime.datetime.now(datetime.UTC).isoformat()
    outcome = run(job.overrides, progress=sys.stderr.isatty())
    made = any(record.created >= started[:19] for record in outcome.records)
    return {
        "state": "done" if made else "skipped",
        "summary": row_summary(outcome.records[-1]),
        "records": [record.key for record in outcome.records],
        "results": str(outcome.folder),
    }
