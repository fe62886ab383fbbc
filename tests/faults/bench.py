"""Where trials run: folders with the small pipeline, and what undisturbed commands make there."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults import compare
from tests.faults.commands import WORKS, filled
from tests.faults.processes import Ended, Program, run


class BrokenCampaign(Exception):
    """The campaign itself cannot go on: an undisturbed command failed."""


@dataclass(frozen=True)
class Template:
    """What a work leaves when nothing disturbs it.

    before: marks before the work, seconds and events: of the work itself.
    """

    folder: Path
    before: compare.Marks
    marks: compare.Marks
    seconds: float
    events: int


@dataclass
class Trial:
    """One trial: its random numbers, what happened, and why it does not hold (empty: it holds)."""

    kind: str
    number: int
    random: random.Random
    folder: Path
    what: str = ""
    where: str = ""
    failures: list[str] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)

    def run(self, program: Program, **how) -> Ended:
        """Run a command in the trial's folder, and keep how it ended."""
        self.ended.append(run(program, self.folder, **how))
        return self.ended[-1]

    def fail(self, *reasons: str) -> None:
        """The trial does not hold."""
        self.failures += reasons

    def expect_words(self, ended: Ended) -> None:
        """A command must end by itself and without a traceback."""
        if ended.hung:
            self.fail("hangs")
        if "Traceback" in ended.text or "internal error" in ended.text:
            self.fail("traceback")

    def expect_success(self, ended: Ended) -> None:
        """A command must end well."""
        self.expect_words(ended)
        if ended.code and not self.failures:
            self.fail(f"exit status {ended.code}")

    def expect(self, marks: compare.Marks, aside: bool = False) -> None:
        """The folder must hold what undisturbed commands leave."""
        self.fail(*compare.differences(compare.marks(self.folder), marks, aside))


class Bench:
    """A home folder for trials, with the model and the captions that their commands read."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.templates: dict[str, Template] = {}
        home.mkdir(parents=True, exist_ok=True)
        words = [f"{colour} {animal}" for animal in ("cat", "dog") for colour in ("red", "green")]
        splits = {
            split: [
                {"name": f"{split[0]}_{i}", "prompt": f"a {text}", "seen": i % 2 == 0}
                for i, text in enumerate(words)
            ]
            for split in ("calibration", "development", "test")
        }
        (home / "captions.json").write_text(json.dumps(splits))

    def folder(self, name: str, start: Template | None = None) -> Path:
        """A new folder for commands, with the contents of a template's."""
        folder = self.home / name
        shutil.rmtree(folder, ignore_errors=True)
        if start is None:
            folder.mkdir(parents=True)
            for shared in ("model", "captions.json"):
                (folder / shared).symlink_to(self.home / shared)
        else:
            shutil.copytree(start.folder, folder, symlinks=True)
        return folder

    def template(self, *works: str) -> Template:
        """What the works leave, one after another, each after the works that it reads."""
        name = "+".join(works)
        if name not in self.templates:
            *earlier, last = works
            earlier += [w for w in WORKS[last].after if w not in earlier]
            start = self.template(*earlier) if earlier else None
            folder = self.folder(f"template_{name}", start)
            before = compare.marks(folder)
            ended = run(filled(WORKS[last].program, folder), folder)
            if ended.code:
                raise BrokenCampaign(f"undisturbed, {last} fails:\n{ended.words}")
            after = compare.marks(folder)
            self.templates[name] = Template(folder, before, after, ended.seconds, ended.events)
        return self.templates[name]


def marks_of(templates: Sequence[Template]) -> compare.Marks:
    """The marks of all templates together."""
    return {name: value for template in templates for name, value in template.marks.items()}
