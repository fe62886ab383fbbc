"""Start the jobs of a sweep through Hydra's launcher, and report how they ended."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from loraq.compose import CONF, load_rows
from loraq.errors import LoraqError
from loraq.results.record import checkout_commit
from loraq.runner.experiment import run
from loraq.runner.plan import plan_rows
from loraq.runner.store import Store
from loraq.runner.sweep import jobs, watch
from loraq.runner.sweep.worker import run_job
from loraq.utils.console import show_messages

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger(__name__)

PLUGINS = {"slurm": "hydra-submitit-launcher", "ray": "hydra-ray-launcher"}


def launch_sweep(overrides: Sequence[str], confirmed: bool = False) -> str:
    """Plan and run all jobs; returns the summary, LoraqError if any job did not finish.

    confirmed: accept a very large number of jobs.
    """
    show_messages()
    _check_launcher(overrides)
    plan, folder = jobs.plan_sweep(overrides, confirmed)
    return _run_jobs(plan, folder)


def rerun_unfinished(folder: Path, overrides: Sequence[str] = ()) -> str:
    """Run the failed, lost and queued jobs of a sweep again, as a new sweep."""
    old, numbers = jobs.read_sweep_plan(folder), watch.unfinished_jobs(folder)
    if not numbers:
        return f"All jobs have finished.\n{watch.sweep_summary(folder)}"
    odd = [o for o in overrides if not o.startswith("hydra")]
    if odd:
        raise LoraqError(
            f"{odd[0]}: --again accepts only hydra/launcher=… and hydra.… overrides. Remove it, or "
            "start a new sweep."
        )
    chosen = [old.jobs[number] for number in numbers]
    composed = jobs.compose_jobs([job.overrides for job in chosen])
    fresh = [
        replace(job, config=jobs.config_hash(rows))
        for job, rows in zip(chosen, composed, strict=True)
    ]
    launcher = list(overrides) or old.launcher
    _check_launcher(launcher)
    plan = replace(
        old, commit=checkout_commit(), code=jobs.code_hash(), launcher=launcher, jobs=fresh
    )
    return _run_jobs(plan, jobs.write_sweep_plan(plan, folder.resolve().parent.parent))


def _run_jobs(plan: jobs.Plan, folder: Path) -> str:
    show_messages()
    log.info("%s, %s", watch.job_count(plan), folder)
    with contextlib.suppress(watch.AllEnded), watch.Watch(folder):
        if not _run_launcher(plan, folder):
            watch.wait_for_jobs(folder)
    text = watch.sweep_summary(folder)
    if watch.unfinished_jobs(folder):
        raise LoraqError(text)
    return f"{text}\n{_experiment_tables(plan)}".rstrip()


def _check_launcher(overrides: Sequence[str]) -> None:
    for override in overrides:
        name = override.partition("=")[2] if override.startswith("hydra/launcher=") else ""
        plugin = PLUGINS.get(name)
        if plugin and not _installed(plugin):
            raise LoraqError(
                f"{override} needs Hydra's plugin {plugin}, which is not installed. Run "
                f"pip install -e '.[{name}]' in the checkout (see docs/cluster.md)."
            )
        if name == "slurm" and shutil.which("sbatch") is None:
            raise LoraqError(
                f"{override} needs Slurm's sbatch, which is not installed here. Start the sweep on "
                "a login node of the cluster, or set hydra/launcher=basic or hydra/launcher=ray."
            )


def _installed(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _run_launcher(plan: jobs.Plan, folder: Path) -> bool:
    """Run Hydra's multirun over the numbers of the jobs; a worker reads its job from the plan.

    Returns False if the launcher failed; jobs that it has started may still be running.
    """
    import hydra

    numbers = ",".join(map(str, range(len(plan.jobs))))
    given = [f"+sweep='{folder}'", f"+job={numbers}", f"hydra.sweep.dir='{folder}/hydra'"]
    before = sys.argv
    sys.argv = ["loraq", "--multirun", *given, *plan.launcher]
    try:
        hydra.main(version_base="1.3", config_path=str(CONF.resolve()), config_name="config")(
            one_job
        )()
    except SystemExit as stop:
        if stop.code not in (0, None):
            log.error("Hydra's launcher ended with an error (above).")
            return False
    finally:
        sys.argv = before
    return True


def one_job(config: DictConfig) -> None:
    """The function that a launcher calls, on this or on another machine."""
    run_job(Path(config.sweep), int(config.job))


def _experiment_tables(plan: jobs.Plan) -> str:
    """The experiment's tables, if its rows were the jobs and all products are on this machine."""
    if plan.whole is None:
        return ""
    configs = load_rows(plan.whole)
    if any(row.todo for row in plan_rows(configs, Store(configs[0].output))):
        return (
            "For the tables of the complete experiment, run on a machine like the workers': "
            f"loraq run {' '.join(plan.whole)}"
        )
    return run(plan.whole, progress=False).text
