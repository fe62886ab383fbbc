"""A command is killed or interrupted at random moments; then the same command ends it."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

from tests.faults import compare
from tests.faults.bench import Bench, Template, Trial
from tests.faults.commands import VERIFY, WORKS, filled, remove_partial
from tests.faults.processes import Fault, Program, Running

PHASES = {
    "rtn": 3, "svdquant": 3, "gptq": 2, "best": 2, "allocated": 3, "metrics": 2, "quantize": 2,
    "generate": 2, "sweep": 2, "tables": 1, "report": 1, "images": 1, "save": 2, "pipeline": 2,
    "remove": 1, "verify": 1,
}  # fmt: skip
"""Works that are killed, with their weights."""
SIGNALS = {signal.SIGKILL: 6, signal.SIGTERM: 2, signal.SIGINT: 2}


def try_kill(bench: Bench, trial: Trial) -> None:
    """Kill a command up to three times, and run it to the end."""
    chance = trial.random
    work = chance.choices(list(PHASES), list(PHASES.values()))[0]
    if work in ("remove", "verify"):
        _kill_cache_command(bench, trial, work)
        return
    template = bench.template(work)
    start = bench.template(*WORKS[work].after) if WORKS[work].after else None
    trial.folder = bench.folder(trial.folder.name, start)
    program = filled(WORKS[work].program, trial.folder)
    trial.what = work
    for _ in range(chance.choice((1, 1, 2, 3))):
        _kill_once(trial, program, template, chance)
        kept = compare.finished_files(trial.folder)
        trial.where = _last_written(trial.folder)
        if work == "sweep":
            program = _again(trial.folder, program)
    trial.expect_success(trial.run(program))
    if not trial.failures:
        trial.expect(template.marks)
        trial.fail(*compare.made_again(trial.folder, kept))


def _kill_once(trial: Trial, program: Program, template: Template, chance: random.Random) -> None:
    """Run the program until a signal ends it, at its n-th change of a file or by the clock."""
    number = chance.choices(list(SIGNALS), list(SIGNALS.values()))[0]
    moment = chance.random()
    if chance.random() < 0.6:
        event = 1 + int(moment * template.events)
        ended = trial.run(program, fault=Fault(number, event))
        trial.what += f", {number.name} at event {event}"
    else:
        running = Running(program, trial.folder)
        time.sleep(moment * template.seconds)
        running.send(number)
        ended = running.wait()
        trial.ended.append(ended)
        trial.what += f", {number.name} at {moment:.0%} of the time"
    compare.let_time_pass(trial.folder)
    if number == signal.SIGINT and not callable(program):  # else Python itself shows it
        trial.expect_words(ended)
        if ended.code not in (0, 130):
            trial.fail(f"exit status {ended.code} after an interruption")


def _kill_cache_command(bench: Bench, trial: Trial, work: str) -> None:
    """Kill `cache` while it removes partial products or verifies; nothing finished may suffer."""
    chance = trial.random
    template = bench.template("rtn")
    trial.folder = bench.folder(trial.folder.name, template)
    program = remove_partial() if work == "remove" else VERIFY
    product = chance.choice(sorted(trial.folder.glob("outputs/*/*/manifest.json"))).parent
    if work == "remove":
        product.rename(product.with_name(f"{product.name}.partial"))
    else:
        (product / "manifest.json").write_text("{")
    trial.what = f"cache, {work}"
    trial.where = product.parent.name
    _kill_once(trial, program, Template(trial.folder, {}, {}, 0.2, 6), chance)
    own = product.relative_to(trial.folder).as_posix().removesuffix(".partial")
    kept = compare.finished_files(trial.folder)
    kept = {name: value for name, value in kept.items() if not name.startswith(f"{own}/")}
    trial.expect_success(trial.run(program))
    trial.expect_success(trial.run(WORKS["rtn"].program))
    if not trial.failures:
        trial.expect(compare.without(template.marks, own, trial.folder), aside=True)
        trial.fail(*compare.made_again(trial.folder, kept))


def _again(folder: Path, program: Program) -> Program:
    """The command that finishes a sweep which was killed: `--again`, if it was planned."""
    sweeps = sorted(path.parent for path in folder.glob("outputs/sweeps/*/plan.json"))
    return ["sweep", "--again", str(sweeps[-1].relative_to(folder))] if sweeps else program


def _last_written(folder: Path) -> str:
    """The phase that was killed: the folder of the file that was written last."""
    files = [p for root in ("outputs", "saved", "groups") for p in (folder / root).rglob("*")]
    files = [path for path in files if path.is_file() and "hydra" not in path.parts]
    if not files:
        return "start"
    last = max(files, key=lambda path: path.stat().st_mtime_ns)
    parts = last.relative_to(folder).parts
    return parts[1] if parts[0] == "outputs" and len(parts) > 2 else parts[0]
