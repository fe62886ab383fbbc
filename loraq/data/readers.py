"""Readers of prompt files in their publishers' formats; prompts keep the order of the file."""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from loraq.data.prompt import Prompt, check_prompts, seed_of_name
from loraq.errors import LoraqError, unknown

Reader = Callable[[Path, str], list[Prompt]]


KARPATHY = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}


class UnknownSplit(LoraqError):
    """The file does not contain the requested split."""


def read_prompts(read: Reader, path: Path, split: str) -> list[Prompt]:
    """Read and check a file's prompts with `read`; LoraqError for a file of another format."""
    stat = path.stat()
    return _read(read, path, split, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=16)
def _read(read: Reader, path: Path, split: str, size: int, modified: int) -> list[Prompt]:
    try:
        prompts = read(path, split)
    except (ValueError, TypeError, KeyError, AttributeError, csv.Error) as error:
        kind = "captions" if read is captions else "prompt"
        raise LoraqError(
            f"'{path}' is not a {kind} file ({type(error).__name__}: {error}). {_FORMATS}"
        ) from None
    check_prompts(prompts, str(path))
    return prompts


_FORMATS = (
    'A captions file contains {"SPLIT": [{"name": …, "prompt": …, "seen": true|false}, …], …}; a '
    "YAML file NAME: PROMPT; a text file one prompt per line; a table a column of prompts."
)


def captions(path: Path, split: str) -> list[Prompt]:
    """The captions format of this project: a JSON object with a list of prompts per split."""
    splits = json.loads(_text(path))
    lists = {name: entries for name, entries in splits.items() if isinstance(entries, list)}
    if split not in lists:
        raise UnknownSplit(f"{path.name}: {unknown('split', split, lists)}")
    return [
        Prompt(str(entry["name"]), str(entry["prompt"]), bool(entry.get("seen", True)))
        for entry in lists[split]
    ]


def mapping(path: Path, split: str) -> list[Prompt]:
    """YAML or JSON with NAME: PROMPT (the SVDQuant reference's prompt files, sDCI)."""
    if path.suffix == ".json":
        found = json.loads(_text(path))
    else:
        import yaml

        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        try:
            found = yaml.load(_text(path), Loader=loader)
        except yaml.YAMLError as error:
            raise ValueError(" ".join(str(error).split())) from None
    return [Prompt(str(name), str(text)) for name, text in _mapping(found).items()]


def mjhq(path: Path, split: str) -> list[Prompt]:
    """MJHQ-30K's meta_data.json with NAME: {category, prompt}."""
    found = _mapping(json.loads(_text(path)))
    return [Prompt(name, entry["prompt"]) for name, entry in found.items()]


def karpathy(path: Path, split: str) -> list[Prompt]:
    """COCO's dataset_coco.json (Karpathy's splits); one caption per image, by its name's hash.

    split: train (includes restval), val or test.
    """
    if split not in KARPATHY:
        raise UnknownSplit(str(unknown("split of COCO", split, KARPATHY)))
    found = []
    for image in json.loads(_text(path))["images"]:
        if image["split"] in KARPATHY[split]:
            name = image["filename"].removesuffix(".jpg").removesuffix(".png")
            sentences = [sentence["raw"] for sentence in image["sentences"]]
            found.append(Prompt(name, sentences[seed_of_name(name) % len(sentences)]))
    return found


def table(*columns: str) -> Reader:
    """A reader of CSV or TSV files; prompts are in the first of `columns` that the file has."""

    def read(path: Path, split: str) -> list[Prompt]:
        kind = csv.excel_tab if path.suffix == ".tsv" else csv.excel
        rows = csv.DictReader(_text(path).splitlines(), dialect=kind)
        present = [name for name in columns if name in (rows.fieldnames or ())]
        if not present:
            raise ValueError(f"no column '{columns[0]}' in {rows.fieldnames}")
        return _numbered(row[present[0]] for row in rows)

    return read


def json_lines(path: Path, split: str) -> list[Prompt]:
    """JSON lines: an object with a `prompt` per line (GenEval)."""
    return _numbered(json.loads(line)["prompt"] for line in _text(path).splitlines())


def lines(path: Path, split: str) -> list[Prompt]:
    """One prompt per line; the names are the line numbers, from 0000."""
    texts = _text(path).rstrip().splitlines()
    if blank := [str(number) for number, text in enumerate(texts, 1) if not text.strip()]:
        raise LoraqError(
            f"'{path}': {len(blank)} of {len(texts)} lines are blank, the first is line "
            f"{blank[0]}. Write a prompt there, or remove the line."
        )
    return _numbered(texts)


def _numbered(texts: Iterable[str]) -> list[Prompt]:
    texts = list(texts)
    digits = max(4, len(str(len(texts))))
    return [Prompt(f"{number:0{digits}d}", text) for number, text in enumerate(texts)]


def _mapping(found: Any) -> Mapping[str, Any]:
    if not isinstance(found, Mapping):
        raise ValueError(f"a mapping is expected, not {type(found).__name__}")
    return found


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")
