"""Start a sweep's jobs through Hydra's launcher, and tell how they ended."""

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
from loraq.runner.plan import make_plan
from loraq.runner.store import Store
from loraq.runner.sweep import jobs, watch
from loraq.runner.sweep.worker import work
from loraq.utils.console import show_messages

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger(__name__)

PLUGINS = {"slurm": "hydra-submitit-launcher", "ray": "hydra-ray-launcher"}


def launch(overrides: Sequence[str]) -> str:
    """Plan the jobs, run them all, and return the summary; LoraqError where any did not finish."""
    _check_launcher(overrides)
    plan, folder = jobs.plan_sweep(overrides)
    return _launch(plan, folder)


def again(folder: Path, overrides: Sequence[str] = ()) -> str:
    """The jobs of a sweep that failed, were lost or never began, as a sweep of their own."""
    old, numbers = jobs.read_sweep_plan(folder), watch.unfinished(folder)
    if not numbers:
        return f"Nothing to do again.\n{watch.summary(folder)}"
    odd = [o for o in overrides if not o.startswith("hydra")]
    if odd:
        raise LoraqError(f"{odd[0]}: with --again only hydra/launcher=… and hydra.… can be given.")
    chosen = [old.jobs[number] for number in numbers]
    fresh = [replace(job, config=jobs.fingerprint(jobs.load_rows(job.overrides))) for job in chosen]
    launcher = list(overrides) or old.launcher
    _check_launcher(launcher)
    plan = replace(
        old, commit=checkout_commit(), code=jobs.code_hash(), launcher=launcher, jobs=fresh
    )
    return _launch(plan, jobs.write_sweep_plan(plan, folder.resolve().parent.parent))


def _launch(plan: jobs.Plan, folder: Path) -> str:
    show_messages()
    log.info("%s, %s", watch.counted(plan), folder)
    with contextlib.suppress(watch.AllEnded), watch.Watch(folder):
        if not _hydra(plan, folder):
            watch.wait(folder)
    told = watch.summary(folder)
    if watch.unfinished(folder):
        raise LoraqError(told)
    return f"{told}\n{_whole(plan)}".rstrip()


def _check_launcher(overrides: Sequence[str]) -> None:
    for override in overrides:
        name = override.partition("=")[2] if override.startswith("hydra/launcher=") else ""
        plugin = PLUGINS.get(name)
        if plugin and not _installed(plugin):
            raise LoraqError(
                f"{override} needs Hydra's plugin {plugin}, which is not installed. Install it: "
                f"pip install -e '.[{name}]' in the checkout (see docs/cluster.md)"
            )
        if name == "slurm" and shutil.which("sbatch") is None:
            raise LoraqError(
                f"{override} needs Slurm's sbatch, which this machine does not have. Start the "
                "sweep on a machine that submits jobs, or take hydra/launcher=basic or ray."
            )


def _installed(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _hydra(plan: jobs.Plan, folder: Path) -> bool:
    """Hydra's multirun over the numbers of the jobs; a worker reads the rest from the plan.

    False where the launcher gave up, which says nothing about jobs that it had started.
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
    """What a launcher calls, here or far away."""
    work(Path(config.sweep), int(config.job))


def _whole(plan: jobs.Plan) -> str:
    """The experiment's tables, where its rows were the jobs and this machine finds them all."""
    if plan.whole is None:
        return ""
    configs = load_rows(plan.whole)
    if any(row.todo for row in make_plan(configs, Store(configs[0].output))):
        return (
            "The tables of the whole experiment: give the same command to `loraq run` on a machine "
            f"like the workers': loraq run {' '.join(plan.whole)}"
        )
    return run(plan.whole, progress=False).text
