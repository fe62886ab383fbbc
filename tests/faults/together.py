"""Two to four commands at once in one output folder, with `cache` commands beside them."""

from __future__ import annotations

import time

from tests.faults import compare
from tests.faults.bench import Bench, Trial, marks_of
from tests.faults.commands import VERIFY, WORKS, filled, remove_partial
from tests.faults.processes import Fault, Running

MAKING = ("rtn", "rtn", "svdquant", "quantize", "generate", "sweep", "best")
READING = ("tables", "report", "images", "pipeline")
START = ("cold", "warm", "interrupted")


def try_together(bench: Bench, trial: Trial) -> None:
    """Start commands within a second; all must end well, with the products of undisturbed ones."""
    chance = trial.random
    state = chance.choice(START)
    count = chance.randint(2, 4)
    first = chance.choice(MAKING)
    works = [first]
    while len(works) < count:
        pool = [first, *MAKING, *(READING if state == "warm" else ())]
        works.append(chance.choice(pool))
    extra = {}
    for name, program in (("verify", VERIFY), ("remove", remove_partial())):
        if chance.random() < 0.4:
            extra[name] = program
    start = bench.template("save", "rtn") if state == "warm" else bench.template("save")
    templates = [start, *(bench.template(work) for work in works)]
    trial.folder = bench.folder(trial.folder.name, start)
    trial.where, trial.what = state, " & ".join([*works, *extra])
    if state == "interrupted":
        event = chance.randint(1, bench.template(first).events)
        trial.run(WORKS[first].program, fault=Fault(9, event))
        compare.let_time_pass(trial.folder)
        trial.what += f", after {first} was killed at event {event}"
    programs = [filled(WORKS[work].program, trial.folder) for work in works]
    running = []
    for program in [*programs, *extra.values()]:
        running.append(Running(program, trial.folder))
        time.sleep(chance.choice((0, 0, chance.random() / 2, chance.random())))
    for one in running:
        trial.ended.append(one.wait())
        trial.expect_success(trial.ended[-1])
    if not trial.failures:
        found, expected = compare.marks(trial.folder), marks_of(templates)
        for marks in (found, expected):  # a page holds the times of its run's records
            for name in [name for name in marks if compare.PAGE.search(name)]:
                del marks[name]
        trial.fail(*compare.differences(found, expected))
