"""The deterministic, disjoint split of names, and ``captions.json``.

``random.Random(0)`` shuffles the sorted slugs of the easy items; the first names are held out for
the test split, the next for development, and the next are the training subjects. Calibration
captions and the seen captions of development and test are disjoint parts of the training subjects.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from loraq.utils.files import write_text

from . import own
from .data import Item, items
from .outside import outside_captions
from .settings import CAPTIONS, OWN, SETTINGS, Settings


@dataclass(frozen=True)
class Split:
    """Slugs of the training subjects and of the caption lists, seen and held out."""

    train: list[str]
    held_test: list[str]
    held_dev: list[str]
    calibration: list[str]
    seen_dev: list[str]
    seen_test: list[str]


def make_split(names: list[str], settings: Settings = SETTINGS) -> Split:
    """Return the split of the given slugs; their order does not matter."""
    order = sorted(names)
    random.Random(settings.seed).shuffle(order)
    a = settings.held_test
    b = a + settings.held_dev
    train = order[b : b + settings.train_subjects]
    c = settings.calibration
    d = c + settings.held_dev
    if len(train) < d + a:
        raise ValueError(f"{len(train)} training names are too few for captions: need {d + a}")
    return Split(
        train=sorted(train),
        held_test=order[:a],
        held_dev=order[a:b],
        calibration=train[:c],
        seen_dev=train[c:d],
        seen_test=train[d : d + a],
    )


def captions(split: Split, by_name: dict[str, Item]) -> dict[str, list[dict]]:
    """Return the ordered caption lists; seen and held-out alternate so that any even prefix
    is balanced."""

    def entry(name: str, seen: bool) -> dict:
        return {"name": name, "prompt": by_name[name].caption, "seen": seen}

    def interleave(seen: list[str], held: list[str]) -> list[dict]:
        pairs = zip(seen, held, strict=True)
        return [e for s, h in pairs for e in (entry(s, True), entry(h, False))]

    return {
        "calibration": [entry(n, True) for n in split.calibration],
        "development": interleave(split.seen_dev, split.held_dev),
        "test": interleave(split.seen_test, split.held_test),
        "outside": outside_captions(),
    }


def load() -> tuple[Split, dict[str, Item]]:
    """Return the split and all items by slug, of the fetched data or of the user's pictures."""
    by_name = {item.name: item for item in (items() if OWN is None else own.items(OWN))}
    easy = [i.name for i in by_name.values() if i.easy]
    return make_split(easy, SETTINGS if OWN is None else own.sizes(len(easy))), by_name


def write(path: Path = CAPTIONS) -> Path:
    """Write ``captions.json`` and return its path."""
    split, by_name = load()
    text = json.dumps(captions(split, by_name), indent=1, ensure_ascii=True) + "\n"
    write_text(path, text)
    return path


if __name__ == "__main__":
    if OWN is not None:
        found = own.items(OWN)
        print(own.check_pictures(found))
        own.check_same(found)
    print(write())
