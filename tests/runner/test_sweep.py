"""Sweeps on the basic launcher: planned, skipped, refused, lost and repeated jobs."""

from __future__ import annotations

import importlib.metadata
import json
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from loraq.compose import load_rows
from loraq.config.composition import Composer
from loraq.config.overrides import expand_sweep
from loraq.errors import LoraqError
from loraq.runner.sweep import jobs, launch_sweep, rerun_unfinished, watch, worker
from loraq.runner.sweep.worker import status_file
from loraq.utils.console import show_messages
from tests.forked import COMMAND, start


@pytest.fixture
def planned(overrides):
    """A plan with two jobs that have not started."""
    return jobs.plan_sweep(["method=rtn,lqer", *overrides])


def by_name(folder: Path) -> list[str]:
    return [found.name for found in watch.job_states(folder)]


def test_a_sweep_says_how_many_jobs_it_composes_and_reads_every_file_once(
    overrides, monkeypatch, capsys
):
    read = []
    content = Composer._read

    def counted(self, name):
        if name not in self._files:
            read.append(name)
        return content(self, name)

    monkeypatch.setattr(Composer, "_read", counted)
    monkeypatch.setattr(jobs, "ASK_ABOVE", 20)
    show_messages()
    with pytest.raises(LoraqError, match=r"30 jobs; the limit is 20.*--yes"):
        jobs.plan_sweep(["method=rtn", "quant.seed=range(0,30)", *overrides])
    plan, _ = jobs.plan_sweep(["method=rtn", "quant.seed=range(0,30)", *overrides], True)
    assert len(plan.jobs) == 30 and plan.title(7) == "quant.seed=7"
    assert "30 jobs; composing them takes about 0 min" in capsys.readouterr().err
    assert len(read) == len(set(read))


@pytest.mark.parametrize("text", ["", "[", "{}", '{"jobs": 3}', '{"jobs": [{"a": 1}]}'])
def test_a_damaged_plan_or_status_is_named(planned, text):
    _, folder = planned
    status_file(folder, 0).write_text(text)
    assert by_name(folder) == ["lost", "queued"]
    (folder / jobs.PLAN).write_text(text)
    for read in (jobs.read_sweep_plan, watch.sweep_summary, rerun_unfinished):
        with pytest.raises(LoraqError, match=r"plan\.json' is damaged.*Restore it"):
            read(folder)


def test_jobs_are_the_product_of_the_swept_overrides(planned):
    plan, folder = planned
    assert [plan.title(number) for number in (0, 1)] == ["method=rtn", "method=lqer"]
    assert by_name(folder) == ["queued", "queued"]
    assert jobs.read_sweep_plan(folder) == plan
    assert len(expand_sweep(["method=rtn,lqer,loftq", "quant.seed=range(0,3)"])) == 9
    assert [job[0] for job in expand_sweep(["method=glob(loraq_o*)"])] == [
        "method=loraq_o1", "method=loraq_o2",
    ]  # fmt: skip
    with pytest.raises(LoraqError, match=r"interval\(0,3\).*KEY=range"):
        jobs.plan_sweep(["method=rtn", "quant.seed=interval(0,3)"])


def test_an_experiments_rows_are_its_jobs(overrides):
    plan, _ = jobs.plan_sweep(["experiment=demo", *overrides])
    assert [plan.title(number) for number in range(4)] == [
        "row=rtn", "row=svdquant", "row=loraq_o2_int8", "row=loraq_o2_w4a8",
    ]  # fmt: skip
    assert plan.whole is not None and "experiment=demo" in plan.whole
    rows = load_rows(plan.jobs[1].overrides)
    assert [row.row for row in rows] == ["reference", "svdquant"]
    with pytest.raises(LoraqError, match=r"row of experiment=demo.*Did you mean 'rtn'"):
        load_rows(["experiment=demo", "row=rtm"])


def test_equal_sweeps_that_start_in_the_same_second_have_folders_of_their_own(planned, tmp_path):
    plan, _ = planned
    folders = {jobs.write_sweep_plan(plan, tmp_path / "same") for _ in range(4)}
    assert len(folders) == 4 and {jobs.read_sweep_plan(f).title(0) for f in folders} == {
        "method=rtn"
    }


def test_an_error_in_one_job_is_raised_before_any_starts(overrides, tmp_path):
    with pytest.raises(LoraqError, match="Did you mean 'lqer'"):
        jobs.plan_sweep(["method=rtn,lqr", *overrides])
    assert not (tmp_path / "outputs" / "sweeps").exists()


def test_done_then_skipped_and_the_failed_ones_again(overrides, tmp_path, capsys, monkeypatch):
    """In other processes, because Hydra keeps global state."""

    def sweep(*arguments: str) -> tuple[int, str]:
        printed = tmp_path / "printed"
        printed.unlink(missing_ok=True)
        process = start(COMMAND, "sweep", *arguments, output=printed)
        process.join(300)
        return process.exitcode, printed.read_text()

    given = ["method=lqer", "quant.branch.rank=4,100000", *overrides]
    code, output = sweep(*given)
    assert code == 2 and "2 jobs: 1 done, 1 failed" in output
    assert "done: quant.branch.rank=4" in output and "quant.branch.rank=100000" in output
    (folder,) = (tmp_path / "outputs" / "sweeps").iterdir()
    assert f"loraq sweep --again {folder}" in output
    code, output = sweep("--again", str(folder))
    assert code == 2 and "1 job: 1 failed" in output
    code, output = sweep(*given)
    assert code == 2 and "2 jobs: 1 skipped, 1 failed" in output
    code, output = sweep("--status", str(folder))
    assert code == 0 and "1 done, 1 failed" in output


def test_other_code_or_another_configuration_is_refused(planned, capsys):
    plan, folder = planned
    for odd, words in (
        (replace(plan, code="0" * 16), "other code"),
        (replace(plan, jobs=[replace(plan.jobs[0], config="0" * 16)]), "another configuration"),
    ):
        other = jobs.write_sweep_plan(odd, folder.parent.parent)
        worker.run_job(other, 0)
        assert watch.job_states(other)[0].name == "failed"
        assert words in watch.job_states(other)[0].text and words in capsys.readouterr().err


def test_a_job_is_lost_if_its_process_has_died(planned):
    _, folder = planned
    running = {"state": "running", "host": "here", "pid": 1}
    worker.status_file(folder, 0).write_text(json.dumps(running))
    assert by_name(folder) == ["lost", "queued"]
    holding, done = threading.Event(), threading.Event()

    def hold() -> None:
        with FileLock(str(worker.lock_file(folder, 0))):
            holding.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    holding.wait(30)
    assert by_name(folder) == ["running", "queued"]
    done.set()
    thread.join()
    assert watch.unfinished_jobs(folder) == [0, 1]
    output = watch.sweep_summary(folder)
    assert "1 lost, 1 queued" in output and "ended without a result" in output


def test_a_launcher_that_waits_forever_is_interrupted(planned, monkeypatch):
    """Submitit waits for a killed job if Slurm has no accounting."""
    _, folder = planned
    for number in range(2):
        text = json.dumps({"state": "done", "summary": "", "seconds": 1.0})
        worker.status_file(folder, number).write_text(text)
    monkeypatch.setattr(watch, "GRACE", 0.1)
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as for background processes of a shell
    try:
        with pytest.raises(watch.AllEnded), watch.Watch(folder, every=0.05):
            threading.Event().wait(20)
    finally:
        signal.signal(signal.SIGINT, ignored)


@pytest.mark.parametrize("name", ["slurm", "ray"])
def test_the_error_for_a_missing_launcher_says_how_to_install_it(name, overrides, monkeypatch):
    def missing(package: str):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr("importlib.metadata.distribution", missing)
    with pytest.raises(LoraqError, match=rf"pip install -e '\.\[{name}\]'"):
        launch_sweep(["method=rtn,lqer", *overrides, f"hydra/launcher={name}"])
