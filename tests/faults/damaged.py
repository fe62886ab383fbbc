"""One file of any kind is damaged; then the commands that read it must notice it or make it again.

noticed   a command names the file, and nothing that it makes differs from what it should be
healed    the file was written again, and all files are what undisturbed commands make
"""

from __future__ import annotations

import fnmatch
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

from loraq.utils.assets import ASSETS
from tests.faults import compare
from tests.faults.bench import Bench, Trial, marks_of
from tests.faults.commands import VERIFY, WORKS, filled
from tests.faults.processes import Fault, Program

HOW = ("flip a bit", "truncate", "empty", "delete", "swap")


ABSENT = "Unknown experiment"
"""What commands say of an experiment whose list of rows is missing."""


@dataclass(frozen=True)
class Class:
    """A kind of file: its patterns, the work that makes it, and commands that may come after."""

    patterns: tuple[str, ...]
    made_by: str
    then: tuple[str, ...]
    stop: float | None = None
    """The work is killed after at most this part of its file changes: it leaves pieces."""


CLASSES = {
    "images": Class(("outputs/images/*.png",), "rtn", ("rtn", "verify+rtn", "report", "images")),
    "packed layers": Class(("outputs/quantised/*.safetensors",), "rtn", ("rtn", "verify+rtn")),
    "activations": Class(
        ("outputs/inputs/*.safetensors",), "svdquant", ("svdquant", "verify+svdquant")
    ),
    "moments": Class(("outputs/moments/*.safetensors",), "gptq", ("gptq", "verify+gptq")),
    "sensitivity": Class(("outputs/sensitivity/*/sensitivity.json",), "allocated", ("allocated",)),
    "embeddings": Class(("outputs/embeddings/*.safetensors",), "rtn", ("rtn", "verify+rtn")),
    "measured": Class(("outputs/measured/*/measured.json",), "rtn", ("rtn", "verify+rtn")),
    "records": Class(
        ("outputs/record/*/record.json",), "rtn", ("rtn", "tables", "report", "verify+rtn")
    ),
    "manifests": Class(("outputs/*/manifest.json",), "rtn", ("rtn", "verify+rtn")),
    "times": Class(("*.seconds", "*/batches/*.json"), "rtn", ("rtn", "verify+rtn")),
    "lists of rows": Class(("outputs/results/*/rows.json",), "rtn", ("rtn", "tables", "report")),
    "tables": Class(
        ("outputs/results/*.md", "outputs/results/*.csv", "outputs/results/*.tex"),
        "rtn",
        ("rtn", "tables"),
    ),
    "pictures": Class(("outputs/results/*.png",), "rtn", ("rtn",)),
    "pages": Class(("outputs/results/*.html",), "report", ("report",)),
    "sweeps": Class(("outputs/sweeps/*/*.json",), "sweep", ("status", "again")),
    "images scored": Class(("outputs/images/*.png",), "images", ("images",)),
    "saved pipelines": Class(
        ("saved/transformer/*", "saved/vae/*", "saved/text_encoder/*", "saved/model_index.json"),
        "pipeline",
        ("pipeline",),
    ),
    "saved transformers": Class(("saved/transformer/*",), "load", ("load",)),
    "pieces: groups": Class(
        ("outputs/quantised/*.partial/*",), "quantize", ("quantize",), stop=0.75
    ),
    "pieces: images": Class(("outputs/images/*.partial/*",), "generate", ("generate",), stop=0.97),
    "pieces: embeddings": Class(("outputs/embeddings/*.partial/*",), "rtn", ("rtn",), stop=0.5),
    "pieces: activations": Class(
        ("outputs/inputs/*.partial/*",), "svdquant", ("svdquant",), stop=0.6
    ),
    "pieces: checkpoint_dir": Class(("groups/*",), "save", ("save",), stop=0.5),
    "assets: model": Class(("tiny_pixart/*",), "packaged", ("packaged",)),
    "assets: metrics": Class(
        ("lpips_alexnet.safetensors", "alignment_head.safetensors", "real_features.safetensors"),
        "metrics",
        ("metrics",),
    ),
    "assets: captions": Class(("captions.json",), "metrics", ("metrics",)),
}
SWEEPS = {"status": ["sweep", "--status"], "again": ["sweep", "--again"]}


def try_damage(bench: Bench, trial: Trial) -> None:
    """Damage one file, and run one or two commands that read it."""
    chance = trial.random
    trial.where = chance.choice(list(CLASSES))
    chosen = CLASSES[trial.where]
    if trial.where.startswith("assets"):
        _try_asset(bench, trial, chosen)
        return
    template = bench.template(chosen.made_by)
    trial.folder = bench.folder(trial.folder.name, template if chosen.stop is None else None)
    if chosen.stop is not None:
        _leave_pieces(bench, trial, chosen)
    files = _matching(trial.folder, chosen.patterns)
    if not files:
        trial.what = "no such file"
        return
    then = chance.choice(chosen.then)
    marks = marks_of([template, *(bench.template(w) for w in then.split("+") if w in WORKS)])
    paths, damage = damage_one(chance, files)
    trial.what = f"{damage}: {paths[0].relative_to(trial.folder)}, then {then}"
    _run_and_judge(trial, then, marks, [p.relative_to(trial.folder).as_posix() for p in paths])


def _leave_pieces(bench: Bench, trial: Trial, chosen: Class) -> None:
    """Kill the work that makes the class's files at about the middle, until there are pieces."""
    work = chosen.made_by
    last = bench.template(work).events * (chosen.stop or 1.0)
    for event in range(int(last * trial.random.uniform(0.6, 1)), 0, -1):
        shutil.rmtree(trial.folder)
        trial.folder = bench.folder(trial.folder.name)
        trial.run(WORKS[work].program, fault=Fault(9, event))
        if _matching(trial.folder, chosen.patterns):
            compare.let_time_pass(trial.folder)
            return


def _run_and_judge(trial: Trial, then: str, marks: compare.Marks, names: list[str]) -> None:
    """Run the commands after the damage, and decide between noticed, healed and neither."""
    damaged = compare.identity(trial.folder, names)
    for word in then.split("+"):
        if word == "verify":
            program: Program = VERIFY
        elif word in SWEEPS:
            (sweep,) = trial.folder.glob("outputs/sweeps/*")
            program = [*SWEEPS[word], sweep.relative_to(trial.folder).as_posix()]
        else:
            program = filled(WORKS[word].program, trial.folder)
        ended = trial.run(program)
        if not callable(program):  # a user's program shows an error as Python does
            trial.expect_words(ended)
    judge(trial, marks, names, damaged)


def judge(
    trial: Trial,
    expected: compare.Marks,
    names: list[str],
    damaged: dict[str, tuple[int, int]],
) -> None:
    """Whether the commands noticed the damaged files or made them again, and no file is wrong.

    names: the damaged files. damaged: `identity` of them right after the damage.
    """
    found = compare.marks(trial.folder)
    finals = {name: name.replace(".partial/", "/") for name in names}
    if any(ended.code for ended in trial.ended if ended.code >= 0):
        others = {name: value for name, value in found.items() if name not in names}
        trial.fail(*compare.wrong_numbers(others, expected))
    else:
        trial.fail(*compare.differences(found, expected, aside=True))
    output = "".join(ended.text for ended in trial.ended)
    if any(Path(name).name in output for name in names) or ABSENT in output:
        return
    for name, final in finals.items():
        now = compare.identity(trial.folder, [final]).get(final)
        if (now and now == damaged.get(name)) or found.get(final) != expected.get(final):
            trial.fail(f"{name} was neither noticed nor made again")


def _try_asset(bench: Bench, trial: Trial, chosen: Class) -> None:
    """Damage a file of the package's copy, run from cold or warm, and restore it."""
    chance = trial.random
    warm = chance.random() < 0.5
    template = bench.template(chosen.made_by)
    trial.folder = bench.folder(trial.folder.name, template if warm else None)
    files = _matching(ASSETS, chosen.patterns)
    saved = {path: (path.read_bytes(), path.stat()) for path in files}
    try:
        paths, damage = damage_one(chance, files)
        place = paths[0].relative_to(ASSETS)
        trial.what = f"{damage}: asset {place}, {'warm' if warm else 'cold'}"
        ended = trial.run(WORKS[chosen.then[0]].program)
    finally:
        for one, (data, status) in saved.items():
            one.write_bytes(data)
            os.utime(one, ns=(status.st_atime_ns, status.st_mtime_ns))
    trial.expect_words(ended)
    found = compare.marks(trial.folder)
    if ended.code:
        trial.fail(*compare.wrong_numbers(found, template.marks))
        if not any(path.name in ended.text for path in paths):
            trial.fail(f"the error does not name {place}")
    else:
        trial.fail(*compare.differences(found, template.marks, aside=True))


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size)
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return [p for n, p in names.items() if any(fnmatch.fnmatch(n, one) for one in patterns)]


def damage_one(chance: random.Random, files: list[Path]) -> tuple[list[Path], str]:
    """Damage one of the files, or swap two; returns them, and how they were damaged."""
    path, how = chance.choice(files), chance.choice(HOW)
    data = path.read_bytes()
    others = [other for other in files if other.read_bytes() != data]
    if how == "swap" and not others:
        how = "flip a bit"
    if how == "flip a bit":
        place = chance.randrange(8 * len(data))
        changed = bytearray(data)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
    elif how == "truncate":
        path.write_bytes(data[: chance.randrange(1, len(data))] if len(data) > 1 else b"")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "delete":
        path.unlink()
    else:
        other = chance.choice(others)
        aside = path.with_name("aside")
        path.rename(aside)
        other.rename(path)
        aside.rename(other)
        return [path, other], how
    return [path], how
