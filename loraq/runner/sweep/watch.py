"""The state of a sweep's jobs, read from their status files."""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loraq.runner.sweep import jobs
from loraq.runner.sweep.worker import lock_file, status_file
from loraq.utils.console import duration
from loraq.utils.output_folder import file_lock

log = logging.getLogger(__name__)

JobStateName = Literal["queued", "running", "done", "skipped", "failed", "lost"]
ENDED = ("done", "skipped", "failed", "lost")
ORDER = ("done", "skipped", "failed", "lost", "running", "queued")
PATIENCE = 30.0  # seconds in which a queued job may start after its launcher has failed
GRACE = 20.0  # seconds that a launcher has to notice that all jobs have ended
SIGNAL = signal.SIGUSR2  # not SIGINT, which background processes of a shell ignore


@dataclass(frozen=True)
class JobState:
    """name: "skipped": all products existed; "lost": the job's process died. text: details."""

    name: JobStateName
    text: str = ""


def job_state(folder: Path, number: int) -> JobState:
    """The state of job `number` of the sweep in `folder`."""
    try:
        found = json.loads(status_file(folder, number).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return JobState("queued")
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or found.get("state") not in (*ENDED, "running"):
        return JobState("lost", f"its status file '{status_file(folder, number)}' is damaged")
    if found["state"] != "running":
        text = found.get("error") or found.get("summary", "")
        return JobState(found["state"], text)
    if _is_locked(lock_file(folder, number)):
        return JobState("running", f"on {found.get('host')}")
    if (again := json.loads(status_file(folder, number).read_text())) != found:
        return JobState(again["state"])  # it has ended in the meantime
    return JobState(
        "lost", f"its process ({found.get('pid')} on {found.get('host')}) ended without a result"
    )


def job_states(folder: Path) -> list[JobState]:
    """The states of all jobs, in the order of the plan."""
    return [job_state(folder, number) for number in range(len(jobs.read_sweep_plan(folder).jobs))]


def _is_locked(lock: Path) -> bool:
    from filelock import Timeout

    try:
        with file_lock(lock, timeout=0):
            return False
    except Timeout:
        return True


class AllEnded(BaseException):
    """All jobs have ended but the launcher waits. Not an Exception, so that it is not caught."""


def _all_ended(*_given: object) -> None:
    raise AllEnded


class Watch:
    """Context manager that logs a line for every job that ends while a launcher runs.

    A launcher may wait forever for a killed job (Submitit does without Slurm accounting). If it
    still waits GRACE seconds after all jobs have ended, `AllEnded` is raised in the main thread.
    """

    def __init__(self, folder: Path, every: float = 1.0) -> None:
        self.folder, self.every = folder, every
        self.plan = jobs.read_sweep_plan(folder)
        self.reported: set[int] = set()
        self.started = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def __enter__(self) -> Watch:
        self._before = signal.signal(SIGNAL, _all_ended)
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._stop.set()
        self._thread.join()
        signal.signal(SIGNAL, self._before)
        self._report_ended()

    def _loop(self) -> None:
        ended: float | None = None
        while not self._stop.wait(self.every):
            self._report_ended()
            if len(self.reported) < len(self.plan.jobs):
                continue
            ended = ended or time.monotonic()
            if time.monotonic() - ended > GRACE:
                signal.pthread_kill(threading.main_thread().ident or 0, SIGNAL)
                return

    def _report_ended(self) -> None:
        """Log the jobs that have ended since the last call."""
        count = len(self.plan.jobs)
        for number in range(count):
            if number in self.reported:
                continue
            found = job_state(self.folder, number)
            if found.name not in ENDED:
                continue
            self.reported.add(number)
            eta = ""
            if len(self.reported) < count:
                spent = time.monotonic() - self.started
                remaining = spent / len(self.reported) * (count - len(self.reported))
                eta = f", about {duration(remaining)} left"
            line = f"[{len(self.reported)}/{count}{eta}] {found.name}: {self.plan.title(number)}"
            log.info("%s\n  %s", line, found.text)


def wait_for_jobs(folder: Path) -> None:
    """Wait until no job runs and none has started for PATIENCE seconds.

    A launcher that fails may leave running jobs behind. Returns at once if no job has started.
    """
    quiet = time.monotonic()
    if all(found.name == "queued" for found in job_states(folder)):
        return
    while names := {found.name for found in job_states(folder)} & {"running", "queued"}:
        if "running" in names:
            quiet = time.monotonic()
        elif time.monotonic() - quiet > PATIENCE:
            return
        time.sleep(0.5)


def unfinished_jobs(folder: Path) -> list[int]:
    """Numbers of the jobs that are neither done nor skipped."""
    return [
        n for n, found in enumerate(job_states(folder)) if found.name not in ("done", "skipped")
    ]


def job_count(plan: jobs.Plan) -> str:
    """`1 job`, `2 jobs`, …"""
    return f"{len(plan.jobs)} job{'s' if len(plan.jobs) != 1 else ''}"


def sweep_summary(folder: Path) -> str:
    """Number of jobs per state, one line per job, and the commands for what is unfinished."""
    plan, found = jobs.read_sweep_plan(folder), job_states(folder)
    counts = Counter[str](one.name for one in found)
    parts = [f"{counts[name]} {name}" for name in ORDER if counts[name]]
    lines = [f"{job_count(plan)}: {', '.join(parts)}"]
    for number, one in enumerate(found):
        lines.append(f"  {one.name:7}  {plan.title(number)}  {one.text}".rstrip())
    if any(one.name in ("failed", "lost", "queued") for one in found):
        lines.append(f"Run the unfinished jobs again: loraq sweep --again {folder}")
    lines.append(f"Show this summary again: loraq sweep --status {folder}")
    return "\n".join(lines)
