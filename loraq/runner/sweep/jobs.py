"""From overrides to jobs, and the plan that they are held to.

OUTPUT/sweeps/ID/plan.json lists every job with its overrides and the hash of its composed
configuration, beside the code's hash. A job that finds other code or another configuration than
it was submitted with refuses to run (`worker.py`).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loraq.compose import expand_sweep, load_rows
from loraq.config import Config
from loraq.errors import LoraqError
from loraq.results.record import checkout_commit
from loraq.utils.assets import CONF, PACKAGE
from loraq.utils.files import write_json
from loraq.utils.hashing import key

PLAN = "plan.json"


@dataclass(frozen=True)
class Job:
    """overrides: what `loraq run` would be given; config: hash of the rows that they compose."""

    overrides: list[str]
    config: str


@dataclass(frozen=True)
class Plan:
    """folder: where the sweep was started, for relative paths; launcher: Hydra's own overrides;
    whole: the experiment whose rows the jobs are, as one run's overrides (None: something else)."""

    folder: str
    commit: str
    code: str
    launcher: list[str]
    jobs: list[Job]
    whole: list[str] | None = None

    def title(self, number: int) -> str:
        """What sets a job apart: its overrides without those that all jobs have."""
        common = set.intersection(*(set(job.overrides) for job in self.jobs))
        own = [o for o in self.jobs[number].overrides if o not in common or len(self.jobs) == 1]
        return " ".join(own)


def plan_sweep(overrides: Sequence[str]) -> tuple[Plan, Path]:
    """The jobs, each composed and checked, and the folder where their plan is written.

    Where nothing is swept over but an experiment is named, its rows are the jobs.
    """
    launcher = [o for o in overrides if o.lstrip("+~").startswith("hydra")]
    plain = [o for o in overrides if o not in launcher]
    lists = expand_sweep(plain)
    composed, whole = [load_rows(one) for one in lists], None
    named = {o.split("=")[0] for o in plain}
    if len(composed) == 1 and "experiment" in named and "row" not in named:
        reference = [row for row in composed[0] if row.quant is None]
        rows = [row for row in composed[0] if row.quant is not None]
        # what `row=NAME` composes; composing the experiment again for every row takes minutes
        lists, composed = [[*plain, f"row={r.row}"] for r in rows], [[*reference, r] for r in rows]
        whole = plain
    jobs = [Job(one, fingerprint(rows)) for one, rows in zip(lists, composed, strict=True)]
    plan = Plan(str(Path.cwd()), checkout_commit(), code_hash(), launcher, jobs, whole)
    return plan, write_sweep_plan(plan, Path(composed[0][0].output))


def write_sweep_plan(plan: Plan, output: Path) -> Path:
    """A new folder under OUTPUT/sweeps with the plan in it."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = output.resolve() / "sweeps" / f"{stamp}-{key(plan)[:4]}"
    folder.mkdir(parents=True)
    write_json(folder / PLAN, plan)
    return folder


def read_sweep_plan(folder: Path) -> Plan:
    """The plan of a sweep; LoraqError where there is none."""
    path = folder / PLAN
    if not path.is_file():
        raise LoraqError(
            f"'{folder}' has no {PLAN}: give the folder that a sweep named at its end."
        )
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return Plan(**{**found, "jobs": [Job(**job) for job in found["jobs"]]})


def fingerprint(rows: Sequence[Config]) -> str:
    """The same on every machine: what is composed, not where it runs."""
    return key([replace(row, output="") for row in rows])


def code_hash() -> str:
    """Of this package's source and configuration, whatever git says."""
    digest = hashlib.sha256()
    # in a checkout conf/ is a link, which rglob does not enter by itself
    for path in sorted([*PACKAGE.rglob("*.py"), *CONF.rglob("*.yaml")]):
        digest.update(f"{path.relative_to(PACKAGE)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
