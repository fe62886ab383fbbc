"""One sweep of eight jobs on Hydra's launchers: wall time, overhead outside jobs, equal records.

    python -m experiments.bench.sweep [--launchers basic slurm ray] [--images 64]
                                      [--output FILE.json]

Eight quantised rows of the embedded model, one thread per job: one at a time on the basic launcher,
two at a time on a single-node Slurm and a local Ray, which the benchmark starts (needs the
environment of `make test-cluster`, and root). Each launcher starts with an empty folder. Overhead
is the fraction of the wall time that workers spend outside jobs: planning, the launcher's start and
waiting, processes and their imports, and the end, when only one of two workers is busy.

Expected time: fifteen minutes on 2 idle cores. Outcome: results/bench/sweep.json, docs/speed.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.cluster import slurm
from loraq.errors import LoraqError, unknown
from loraq.results import record

JOBS = ["method=rtn,lqer", "quant.weight.clip=none,mse", "quant.seed=0,1"]
SETTINGS = ["metrics=paired", "tracking=disabled", "threads=1"]
SETTINGS += ["calibration.measure_prompts=2", "calibration.rows_per_layer=64"]
LAUNCHERS: dict[str, tuple[int, list[str]]] = {
    "basic": (1, []),
    "slurm": (
        2,
        [
            "hydra/launcher=slurm",
            "hydra.launcher.array_parallelism=2",
            "hydra.launcher.cpus_per_task=1",
        ],
    ),
    "ray": (2, ["hydra/launcher=ray", "+hydra.launcher.ray.init.num_cpus=2"]),
}
"""Launcher → (workers, overrides that select it)."""


@contextlib.contextmanager
def environment(launcher: str, folder: Path) -> Iterator[dict[str, str]]:
    """Context manager: the environment of a sweep's processes, with Slurm running if selected."""
    own = {"OMP_NUM_THREADS": "1", "RAY_DEDUP_LOGS": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    if launcher != "slurm":
        yield {**os.environ, **own}
        return
    if missing := slurm.missing():
        raise LoraqError(
            f"{missing} are not installed. Install them, or remove slurm from --launchers."
        )
    with slurm.cluster(folder / "slurm") as there:
        yield there | own


def run_sweep(launcher: str, images: int, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """One launcher's measurements, and its comparable records (without time and machine)."""
    workers, overrides = LAUNCHERS[launcher]
    output, log = folder / "outputs", folder / "log"
    command = [sys.executable, "-m", "loraq.cli", "sweep", *JOBS, *SETTINGS, *overrides]
    command += [f"data.count={images}", f"output={output}"]
    with environment(launcher, folder) as there, log.open("wb") as stream:
        began = time.time()
        code = subprocess.run(command, env=there, stdout=stream, stderr=stream).returncode
        wall = time.time() - began
    if code:
        raise LoraqError(f"{launcher} failed:\n{log.read_text()[-2000:]}")
    jobs = [json.loads(path.read_text()) for path in sorted(output.glob("sweeps/*/job_*.json"))]
    busy = sum(job["seconds"] for job in jobs)
    first = min(job["started"] for job in jobs)
    last = max(job["started"] + job["seconds"] for job in jobs)
    found = [record.load_record(path) for path in sorted(output.glob("record/*/record.json"))]
    row = {
        "workers": workers,
        "jobs": len(jobs),
        "processes": len({job["pid"] for job in jobs}),
        "wall_seconds": wall,
        "job_seconds": busy,
        "before_seconds": first - began,
        "after_seconds": began + wall - last,
        "overhead": 1 - busy / (workers * wall),
    }
    return row, {one.key: one.comparable() for one in found}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write the record; LoraqError if the launchers' records differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--launchers", nargs="+", default=list(LAUNCHERS), metavar="NAME")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    rows: dict[str, dict[str, Any]] = {}
    expected: dict[str, Any] | None = None
    for launcher in options.launchers:
        if launcher not in LAUNCHERS:
            raise unknown("launcher", launcher, LAUNCHERS)
        with tempfile.TemporaryDirectory() as folder:
            row, records = run_sweep(launcher, options.images, Path(folder))
        expected = records if expected is None else expected
        row["same_records"] = records == expected
        rows[launcher] = row
        print(
            f"{launcher:6} {row['wall_seconds']:6.0f} s, {row['job_seconds']:.0f} s in jobs, "
            f"overhead {100 * row['overhead']:.1f} %, same records: {row['same_records']}",
            flush=True,
        )
    if options.output is not None:
        settings = {"images": options.images, "jobs": JOBS, "settings": SETTINGS}
        record.save_findings({"settings": settings, "launchers": rows}, options.output)
    if not all(row["same_records"] for row in rows.values()):
        raise LoraqError("The launchers' records differ.")


if __name__ == "__main__":
    main()
