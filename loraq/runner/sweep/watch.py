"""What became of a sweep's jobs, read from the files that they leave."""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from loraq.runner.sweep import jobs
from loraq.runner.sweep.worker import lock_file, status_file
from loraq.utils.console import duration

log = logging.getLogger(__name__)

ENDED = ("done", "skipped", "failed", "lost")
ORDER = ("done", "skipped", "failed", "lost", "running", "queued")
PATIENCE = 30.0  # seconds in which a queued job may start once a launcher has given up
GRACE = 20.0  # seconds in which a launcher may notice that all jobs have ended
SIGNAL = signal.SIGUSR2  # SIGINT is ignored by what a shell runs in its background


@dataclass(frozen=True)
class State:
    """name: queued, running, done, skipped (all was there), failed, or lost: its process died."""

    name: str
    text: str = ""


def state(folder: Path, number: int) -> State:
    try:
        found = json.loads(status_file(folder, number).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return State("queued")
    if found["state"] != "running":
        text = found.get("error") or found.get("summary", "")
        return State(found["state"], text)
    if _held(lock_file(folder, number)):
        return State("running", f"on {found['host']}")
    if (again := json.loads(status_file(folder, number).read_text())) != found:
        return State(again["state"])  # it ended in between
    return State("lost", f"its process ({found['pid']} on {found['host']}) ended without a word")


def states(folder: Path) -> list[State]:
    return [state(folder, number) for number in range(len(jobs.read_sweep_plan(folder).jobs))]


def _held(lock: Path) -> bool:
    from filelock import FileLock, Timeout

    try:
        with FileLock(str(lock), timeout=0):
            return False
    except Timeout:
        return True


class AllEnded(BaseException):
    """Every job has ended, and the launcher has not noticed. No Exception, so that it passes."""


def _all_ended(*_given: object) -> None:
    raise AllEnded


class Watch:
    """A line for every job that ends, while a launcher runs them; use as a context manager.

    A launcher may wait forever for a job that was killed (Submitit does where Slurm keeps no
    accounts). Once all jobs have ended and it still waits, the main thread gets `AllEnded`.
    """

    def __init__(self, folder: Path, every: float = 1.0) -> None:
        self.folder, self.every = folder, every
        self.plan = jobs.read_sweep_plan(folder)
        self.told: set[int] = set()
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
        self.look()

    def _loop(self) -> None:
        ended: float | None = None
        while not self._stop.wait(self.every):
            self.look()
            if len(self.told) < len(self.plan.jobs):
                continue
            ended = ended or time.monotonic()
            if time.monotonic() - ended > GRACE:
                signal.pthread_kill(threading.main_thread().ident or 0, SIGNAL)
                return

    def look(self) -> None:
        """Tell of jobs that have ended since the last look."""
        count = len(self.plan.jobs)
        for number in range(count):
            if number in self.told:
                continue
            found = state(self.folder, number)
            if found.name not in ENDED:
                continue
            self.told.add(number)
            left = ""
            if len(self.told) < count:
                spent = time.monotonic() - self.started
                rest = spent / len(self.told) * (count - len(self.told))
                left = f", about {duration(rest)} left"
            line = f"[{len(self.told)}/{count}{left}] {found.name}: {self.plan.title(number)}"
            log.info("%s\n  %s", line, found.text)


def wait(folder: Path) -> None:
    """Until no job runs any more, and none has begun for a while: a launcher that fails leaves
    jobs behind that go on without it. Where none ever began there is nothing to wait for."""
    quiet = time.monotonic()
    if all(found.name == "queued" for found in states(folder)):
        return
    while names := {found.name for found in states(folder)} & {"running", "queued"}:
        if "running" in names:
            quiet = time.monotonic()
        elif time.monotonic() - quiet > PATIENCE:
            return
        time.sleep(0.5)


def unfinished(folder: Path) -> list[int]:
    return [n for n, found in enumerate(states(folder)) if found.name not in ("done", "skipped")]


def counted(plan: jobs.Plan) -> str:
    return f"{len(plan.jobs)} job{'s' if len(plan.jobs) != 1 else ''}"


def summary(folder: Path) -> str:
    """How many jobs ended how, each with its outcome, and what to do about those that failed."""
    plan, found = jobs.read_sweep_plan(folder), states(folder)
    counts = Counter(one.name for one in found)
    parts = [f"{counts[name]} {name}" for name in ORDER if counts[name]]
    lines = [f"{counted(plan)}: {', '.join(parts)}"]
    for number, one in enumerate(found):
        lines.append(f"  {one.name:7}  {plan.title(number)}  {one.text}".rstrip())
    if any(one.name in ("failed", "lost", "queued") for one in found):
        lines.append(f"Only these again: loraq sweep --again {folder}")
    lines.append(f"Look again: loraq sweep --status {folder}")
    return "\n".join(lines)
