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
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loraq.compose import load_rows
from loraq.config import Config
from loraq.config.overrides import expand_sweep
from loraq.errors import LoraqError
from loraq.results.record import checkout_commit
from loraq.utils.assets import CONF, PACKAGE
from loraq.utils.files import write_json
from loraq.utils.hashing import key
from loraq.utils.output_folder import check_output_folder

PLAN = "plan.json"


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

    def title(self, number: int) -> str:
        """The overrides of a job that not all jobs have."""
        common = set.intersection(*(set(job.overrides) for job in self.jobs))
        own = [o for o in self.jobs[number].overrides if o not in common or len(self.jobs) == 1]
        return " ".join(own)

    def __repr__(self) -> str:
        return f"Plan({len(self.jobs)} jobs, folder='{self.folder}', commit={self.commit!r})"


def plan_sweep(overrides: Sequence[str]) -> tuple[Plan, Path]:
    """The plan of all jobs, composed and checked, and the new folder in which it is stored.

    If no override is swept over and an experiment is set, its rows are the jobs.
    """
    launcher = [o for o in overrides if o.lstrip("+~").startswith("hydra")]
    plain = [o for o in overrides if o not in launcher]
    lists = expand_sweep(plain)
    composed, whole = [load_rows(one) for one in lists], None
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
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return Plan(**{**found, "jobs": [Job(**job) for job in found["jobs"]]})


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
