"""A sweep: many jobs of one configuration each, run by a Hydra launcher, watched, summed up.

    jobs.py     overrides → jobs, written down before anything starts; what a job must find again
    worker.py   one job, in whatever process a launcher starts; leaves a file that says how it went
    watch.py    reads those files: progress while jobs run, the summary, which are to be run again

Where jobs run is Hydra's business: `hydra/launcher=basic` (here, one after the other), `slurm`
(Submitit) or `ray`. Jobs share products through the store's locks: one makes what several want.
"""

from __future__ import annotations

from loraq.runner.sweep.launch import again, launch
from loraq.runner.sweep.watch import summary as status

__all__ = ["again", "launch", "status"]
