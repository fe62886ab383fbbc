"""Sweeps: many jobs with one configuration each, run by a Hydra launcher.

    jobs.py     overrides → jobs, and the plan file that lists them
    worker.py   runs one job in the process that a launcher starts; writes its status file
    watch.py    reads the status files: progress, summary, unfinished jobs
    launch.py   starts the jobs of a plan through the launcher

Hydra's launcher decides where jobs run: `hydra/launcher=basic` (this process, one after the other),
`slurm` (Submitit) or `ray`. Jobs share products through the store's locks: a product that several
jobs need is made once. Only `loraq.cli` and `loraq.run` import this package.
"""

from __future__ import annotations

from loraq.runner.sweep.launch import launch_sweep, rerun_unfinished
from loraq.runner.sweep.watch import sweep_summary

__all__ = ["launch_sweep", "rerun_unfinished", "sweep_summary"]
