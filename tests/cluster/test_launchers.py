"""The same sweep on the basic launcher, a real Slurm and a local Ray: `make test-cluster`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.cluster import slurm
from loraq.results.record import load_record

pytestmark = pytest.mark.cluster
TWO_WORKERS = "hydra.launcher.array_parallelism=2"
LAUNCHERS = {
    "slurm": ["hydra/launcher=slurm", TWO_WORKERS, "hydra.launcher.cpus_per_task=1"],
    "ray": ["hydra/launcher=ray", "+hydra.launcher.ray.init.num_cpus=2"],
}
EMBEDDED = ["model.steps=4", "data.count=4", "metrics=paired", "metrics.bootstrap=100"]
EMBEDDED += ["calibration.prompts=2", "calibration.measure_prompts=2", "threads=1"]
EMBEDDED += ["calibration.rows_per_layer=64", "tracking=disabled", "generate.batch_size=4"]
JOBS = ["method=rtn,lqer", "quant.weight.clip=none,mse", "quant.seed=0,1"]


@pytest.fixture(scope="module")
def slurm_environment(tmp_path_factory):
    if missing := slurm.missing():
        pytest.fail(
            f"not installed: {missing}. apt-get install slurmctld slurmd slurm-client munge"
        )
    with slurm.cluster(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment


@pytest.fixture
def environment(request):
    """Environment variables of the launcher's processes; Slurm is started once per module."""
    there = dict(os.environ)
    if request.node.callspec.params.get("launcher") == "slurm":
        there = request.getfixturevalue("slurm_environment")
    return there | {"OMP_NUM_THREADS": "1", "RAY_DEDUP_LOGS": "0", "RAY_USAGE_STATS_ENABLED": "0"}


def sweep(output: Path, environment: dict[str, str], *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "loraq.cli", "sweep", *arguments]
    with open(output.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def records(output: Path) -> dict[str, dict]:
    """The comparable part of every finished record, by key."""
    found = (load_record(path) for path in sorted(output.glob("record/*/record.json")))
    return {record.key: record.comparable() for record in found}


def states(output: Path) -> list[dict]:
    (folder,) = (output / "sweeps").iterdir()
    return [json.loads(path.read_text()) for path in sorted(folder.glob("job_*.json"))]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The records of the eight jobs on the basic launcher."""
    output = tmp_path_factory.mktemp("basic") / "outputs"
    there = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = sweep(output, there, *JOBS, *EMBEDDED, f"output={output}").wait(900)
    assert done == 0, output.with_suffix(".log").read_text()
    found = records(output)
    assert len(found) == 9  # and the 16-bit model's
    return found


@pytest.mark.parametrize("launcher", ["slurm", "ray"])
def test_eight_jobs_give_the_same_records_everywhere(launcher, environment, expected, tmp_path):
    output = tmp_path / "outputs"
    own = [*JOBS, *EMBEDDED, f"output={output}", *LAUNCHERS[launcher]]
    done = sweep(output, environment, *own).wait(900)
    log = output.with_suffix(".log").read_text()
    assert done == 0 and "8 jobs: 8 done" in log, log
    assert records(output) == expected
    assert len({one["pid"] for one in states(output)}) > 1


@pytest.mark.parametrize("launcher", ["slurm", "ray"])
def test_killed_and_failing_jobs_do_not_stop_the_others(launcher, environment, expected, tmp_path):
    """The worker of one job is killed; another job cannot succeed; the others finish."""
    output = tmp_path / "outputs"
    ranks = "quant.branch.rank=4,5,6,7,8,9,100000"
    own = ["method=lqer", ranks, *EMBEDDED, f"output={output}", *LAUNCHERS[launcher]]
    if launcher == "ray":
        own.append("+hydra.launcher.ray.remote.max_retries=0")
    process = sweep(output, environment, *own)
    kill_a_worker(output)
    assert process.wait(900) == 2
    log = output.with_suffix(".log").read_text()
    assert "1 failed, 1 lost" in log and "100000" in log and "--again" in log, log
    assert "5 done" in log, log
    (folder,) = (output / "sweeps").iterdir()
    again = sweep(output, environment, "--again", str(folder))
    assert again.wait(900) == 2  # the invalid job fails again
    second = output.with_suffix(".log").read_text().removeprefix(log)
    assert "2 jobs: 1 done, 1 failed" in second, second
    assert len(records(output)) == 7  # six ranks and the 16-bit model


def kill_a_worker(output: Path) -> None:
    for _ in range(600):
        for path in output.glob("sweeps/*/job_*.json"):
            one = json.loads(path.read_text())
            if one["state"] == "running" and one["pid"] != os.getpid():
                os.kill(one["pid"], signal.SIGKILL)
                return
        time.sleep(0.1)
    raise AssertionError("no job has started")


def test_a_sweep_over_rows_writes_the_experiments_tables(tmp_path):
    output = tmp_path / "outputs"
    there = {**os.environ, "OMP_NUM_THREADS": "1"}
    settings = [*EMBEDDED, "experiment=demo", f"output={output}"]
    assert sweep(output, there, *settings).wait(900) == 0
    swept = {path.name: path.read_bytes() for path in output.glob("results/demo-*/*.md")}
    shutil.rmtree(output / "results")
    run = [sys.executable, "-m", "loraq.cli", "run", "--quiet", *settings]
    subprocess.run(run, env=there, check=True, capture_output=True, timeout=900)
    assert swept == {path.name: path.read_bytes() for path in output.glob("results/demo-*/*.md")}
    assert {"main.md", "paired.md"} <= swept.keys()
