"""From overrides to jobs, and the plan file of a sweep.

OUTPUT/sweeps/ID/plan.json lists every job with its overrides and the hash of its composed
configuration, and the hash of the code. A job refuses to run if its code or configuration differs
from the plan (`worker.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from loraq.compose import load_rows
from loraq.config import Config
from loraq.config.composition import Composer
from loraq.config.overrides import MOST_JOBS, expand_sweep
from loraq.errors import LoraqError
from loraq.results.record import checkout_commit
from loraq.utils.assets import CONF, PACKAGE
from loraq.utils.console import duration
from loraq.utils.files import write_json
from loraq.utils.hashing import key
from loraq.utils.output_folder import check_output_folder

log = logging.getLogger(__name__)

PLAN = "plan.json"
ASK_ABOVE = 1_000
"""A sweep of more jobs has to be confirmed."""


@dataclass(frozen=True)
class Job:
    """overrides: arguments of `loraq run`; config: `config_hash` of the rows that they compose."""

    overrides: list[str]
    config: str


@dataclass(frozen=True)
class Plan:
    """The jobs of a sweep, as `plan.json` stores them.

    folder: working directory at the start, for relative paths. launcher: Hydra's own overrides.
    whole: overrides of the experiment whose rows are the jobs; None for any other sweep.
    """

    folder: str
    commit: str
    code: str
    launcher: list[str]
    jobs: list[Job]
    whole: list[str] | None = None

    @cached_property
    def _common(self) -> set[str]:
        """The overrides that all jobs have; none if there is one job."""
        several = len(self.jobs) > 1
        return set.intersection(*(set(job.overrides) for job in self.jobs)) if several else set()

    def title(self, number: int) -> str:
        """The overrides of a job that not all jobs have."""
        return " ".join(o for o in self.jobs[number].overrides if o not in self._common)

    def __repr__(self) -> str:
        return f"Plan({len(self.jobs)} jobs, folder='{self.folder}', commit={self.commit!r})"


def plan_sweep(overrides: Sequence[str], confirmed: bool = False) -> tuple[Plan, Path]:
    """The plan of all jobs, composed and checked, and the new folder in which it is stored.

    If no override is swept over and an experiment is set, its rows are the jobs.
    confirmed: accept more than `ASK_ABOVE` jobs.
    """
    launcher = [o for o in overrides if o.lstrip("+~").startswith("hydra")]
    plain = [o for o in overrides if o not in launcher]
    lists = expand_sweep(plain, MOST_JOBS if confirmed else ASK_ABOVE)
    composed, whole = list(compose_jobs(lists)), None
    named = {o.split("=")[0] for o in plain}
    if len(composed) == 1 and "experiment" in named and "row" not in named:
        reference = [row for row in composed[0] if row.quant is None]
        rows = [row for row in composed[0] if row.quant is not None]
        # equal to composing with `row=NAME`, which takes minutes for all rows of an experiment
        lists, composed = [[*plain, f"row={r.row}"] for r in rows], [[*reference, r] for r in rows]
        whole = plain
    jobs = [Job(one, config_hash(rows)) for one, rows in zip(lists, composed, strict=True)]
    plan = Plan(str(Path.cwd()), checkout_commit(), code_hash(), launcher, jobs, whole)
    return plan, write_sweep_plan(plan, Path(composed[0][0].output))


def compose_jobs(lists: Sequence[Sequence[str]]) -> Iterator[list[Config]]:
    """The rows of every job, with a progress bar if there are many; reads every file once."""
    from tqdm import tqdm

    composer = Composer(CONF)
    many = len(lists) > ASK_ABOVE // 10
    if many:
        load_rows(lists[0], composer=composer)  # reads the files
        started = time.perf_counter()
        load_rows(lists[1], composer=composer)
        seconds = (time.perf_counter() - started) * len(lists)
        log.info("%s jobs; composing them takes about %s", f"{len(lists):,}", duration(seconds))
    for overrides in tqdm(lists, desc="  compose", unit="job", disable=not many, leave=False):
        yield load_rows(overrides, composer=composer)


def write_sweep_plan(plan: Plan, output: Path) -> Path:
    """Write the plan into a new folder under OUTPUT/sweeps, and return the folder."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    elsewhere = any(
        o.startswith("hydra/launcher=") and not o.endswith("=basic") for o in plan.launcher
    )
    check_output_folder(output, machines=elsewhere)
    for number in itertools.count(1):  # equal sweeps may start in the same second
        name = f"{stamp}-{key(plan)[:4]}" + (f"-{number}" if number > 1 else "")
        folder = output.resolve() / "sweeps" / name
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            break
    write_json(folder / PLAN, plan)
    return folder


def read_sweep_plan(folder: Path) -> Plan:
    """The plan of a sweep; LoraqError if the folder has none."""
    path = folder / PLAN
    if not path.is_file():
        raise LoraqError(
            f"'{folder}' has no {PLAN}. Pass the folder that the sweep printed when it ended."
        )
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return Plan(**{**found, "jobs": [Job(**job) for job in found["jobs"]]})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LoraqError(
            f"'{path}' is damaged ({type(error).__name__}: {error}). Restore it, or start the "
            "sweep again: finished products are reused."
        ) from None


def config_hash(rows: Sequence[Config]) -> str:
    """Hash of the composed rows without `output`: the same on every machine."""
    return key([replace(row, output="") for row in rows])


def code_hash() -> str:
    """Hash of the package's source and configuration files, independent of git."""
    digest = hashlib.sha256()
    # in a checkout PACKAGE/conf is a symbolic link, which rglob does not follow
    for path in sorted([*PACKAGE.rglob("*.py"), *CONF.rglob("*.yaml")]):
        digest.update(f"{path.relative_to(PACKAGE)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
