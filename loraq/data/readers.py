"""Readers of prompt files in their publishers' formats; prompts keep the order of the file."""

from __future__ import annotations

import csv
import functools
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loraq.data.prompt import Prompt, check_prompts, seed_of_name
from loraq.data.text import read_lines, read_text
from loraq.errors import LoraqError, unknown
from loraq.utils.hashing import cached_hash
from loraq.utils.plain import parse_json

Reader = Callable[[Path, str], list[Prompt]]

KARPATHY = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}


class UnknownSplit(LoraqError):
    """The file does not contain the requested split."""


def read_prompts(read: Reader, path: Path, split: str) -> list[Prompt]:
    """Read and check a file's prompts with `read`; LoraqError for a file of another format."""
    contents = cached_hash(path) if path.is_file() else ""
    return _read(read, path, split, contents)


@functools.lru_cache(maxsize=16)
def _read(read: Reader, path: Path, split: str, contents: str) -> list[Prompt]:
    try:
        prompts = read(path, split)
    except (ValueError, TypeError, LookupError, AttributeError, OSError, csv.Error) as error:
        kind = "captions" if read is captions else "prompt"
        raise LoraqError(
            f"'{path}' is not a {kind} file ({type(error).__name__}: {error}). {_FORMATS}"
        ) from None
    if not prompts:
        raise LoraqError(f"'{path}' has no prompts. {_FORMATS}")
    check_prompts(prompts, str(path))
    return prompts


_FORMATS = (
    'A captions file contains {"SPLIT": [{"name": …, "prompt": …, "seen": true|false}, …], …}; a '
    "YAML file NAME: PROMPT; a text file one prompt per line; a table a column of prompts."
)


def captions(path: Path, split: str) -> list[Prompt]:
    """The captions format of this project: a JSON object with a list of prompts per split."""
    splits = _mapping(parse_json(read_text(path)))
    lists = {name: entries for name, entries in splits.items() if isinstance(entries, list)}
    if split not in lists:
        raise UnknownSplit(f"{path.name}: {unknown('split', split, lists)}")
    found = []
    for number, entry in enumerate(lists[split], 1):
        seen = entry.get("seen", True)
        if not isinstance(seen, bool):
            raise ValueError(f"'seen' of entry {number} is {_shown(seen)}, not true or false")
        name = _words(entry["name"], f"the name of entry {number}")
        found.append(Prompt(name, _words(entry["prompt"], f"the prompt of '{name}'"), seen))
    return found


def mapping(path: Path, split: str) -> list[Prompt]:
    """YAML or JSON with NAME: PROMPT (the SVDQuant reference's prompt files, sDCI)."""
    text = read_text(path)
    if path.suffix.lower() != ".json":
        return _yaml(path, text)
    found = _mapping(parse_json(text))
    return [Prompt(name, _words(text, f"the prompt of '{name}'")) for name, text in found.items()]


def _yaml(path: Path, text: str) -> list[Prompt]:
    """Names and prompts as the file has them: the name 0010 is not the number 8."""
    import yaml

    try:
        root = yaml.compose(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"a mapping is expected, not {'nothing' if root is None else root.id}")
    found = []
    for name, value in root.value:
        place = f"'{path}', line {name.start_mark.line + 1}"
        if not isinstance(name, yaml.ScalarNode) or name.tag.endswith(":merge"):
            raise LoraqError(f"{place}: a name is expected, not a {name.id}. Write NAME: PROMPT.")
        if value.tag != "tag:yaml.org,2002:str":
            kind = value.tag.rpartition(":")[2]
            raise LoraqError(
                f"{place}: the prompt of '{name.value}' is of the type {kind}, not text. Put it in "
                "quotes."
            )
        found.append(Prompt(name.value, value.value))
    return found


def mjhq(path: Path, split: str) -> list[Prompt]:
    """MJHQ-30K's meta_data.json with NAME: {category, prompt}."""
    return [
        Prompt(name, _words(entry["prompt"], f"the prompt of '{name}'"))
        for name, entry in _mapping(parse_json(read_text(path))).items()
    ]


def mjhq_categories(path: Path) -> dict[str, str]:
    """The category of every name in MJHQ-30K's meta_data.json, which `mjhq` has read."""
    return _categories(path, cached_hash(path))


@functools.lru_cache(maxsize=4)
def _categories(path: Path, contents: str) -> dict[str, str]:
    found = _mapping(parse_json(read_text(path)))
    return {name: _words(e["category"], f"the category of '{name}'") for name, e in found.items()}


def karpathy(path: Path, split: str) -> list[Prompt]:
    """COCO's dataset_coco.json (Karpathy's splits); one caption per image, by its name's hash.

    split: train (includes restval), val or test.
    """
    if split not in KARPATHY:
        raise UnknownSplit(str(unknown("split of COCO", split, KARPATHY)))
    found = []
    for image in _mapping(parse_json(read_text(path)))["images"]:
        if image["split"] in KARPATHY[split]:
            name = _words(image["filename"], "a filename")
            name = name.removesuffix(".jpg").removesuffix(".png")
            sentences = [sentence["raw"] for sentence in image["sentences"]]
            if not sentences:
                raise ValueError(f"'{name}' has no captions")
            chosen = sentences[seed_of_name(name) % len(sentences)]
            found.append(Prompt(name, _words(chosen, f"a caption of '{name}'")))
    return found


def table(*columns: str, quoted: bool = True) -> Reader:
    """A reader of CSV or TSV files; prompts are in the one of `columns` that the file has.

    The first line decides whether columns are separated by commas, semicolons or tabs.

    quoted: a field may stand in double quotes, as spreadsheets write it; otherwise quotes are part
        of the text, and a field has neither tabs nor line ends.
    """

    def read(path: Path, split: str) -> list[Prompt]:
        text = read_text(path)
        form: dict[str, Any] = {"quoting": csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE}
        for delimiter in "\t,;" if path.suffix.lower() == ".tsv" else ",;\t":
            form["delimiter"] = delimiter
            header = next(csv.reader(io.StringIO(text), **form), [])
            if present := [i for i, name in enumerate(header) if name.strip() in columns]:
                break
        else:
            raise ValueError(f"no column '{columns[0]}' in the first line, {text[:60]!r}")
        if len(present) > 1:
            names = ", ".join(f"'{header[place]}'" for place in present)
            raise ValueError(f"{len(present)} columns could hold the prompts ({names}); keep one")
        _, *rows = _rows(path, text, form)
        return _numbered(_cell(path, line, row, present[0], len(header)) for line, row in rows)

    return read


def _rows(path: Path, text: str, form: Mapping[str, Any]) -> list[tuple[int, list[str]]]:
    """Every row with the number of its first line, without blank rows at the end of the file."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, **form)
    found, line = [], 1
    try:
        for row in reader:
            found.append((line, row))
            line = reader.line_num + 1
    except csv.Error as error:
        raise LoraqError(
            f"'{path}', line {line}: {error}. Put a field with quotes in double quotes, and write "
            "every double quote inside it twice."
        ) from None
    while found and not any(cell.strip() for cell in found[-1][1]):
        found.pop()
    return found


def _cell(path: Path, line: int, row: Sequence[str], place: int, width: int) -> str:
    if len(row) > width:
        raise LoraqError(
            f"'{path}', line {line}: {len(row)} fields, but the first line has {width}. Put a "
            "prompt that contains the separator in double quotes."
        )
    if place >= len(row) or not row[place].strip():
        raise LoraqError(
            f"'{path}', line {line}: the prompt is blank. Write a prompt there, or remove the row."
        )
    return row[place]


def json_lines(path: Path, split: str) -> list[Prompt]:
    """JSON lines: an object with a `prompt` per line (GenEval)."""
    texts = []
    for number, line in enumerate(read_lines(path), 1):
        try:
            texts.append(_words(_mapping(parse_json(line))["prompt"], "the prompt"))
        except (ValueError, KeyError) as error:
            raise LoraqError(
                f"'{path}', line {number}: {type(error).__name__}: {error}. Write an object with a "
                'prompt per line: {"prompt": "…"}.'
            ) from None
    return _numbered(texts)


def lines(path: Path, split: str) -> list[Prompt]:
    """One prompt per line; the names are the line numbers, from 0000."""
    return _numbered(read_lines(path))


def _numbered(texts: Iterable[str]) -> list[Prompt]:
    texts = list(texts)
    digits = max(4, len(str(len(texts))))
    return [Prompt(f"{number:0{digits}d}", text) for number, text in enumerate(texts)]


def _mapping(found: Any) -> Mapping[str, Any]:
    if not isinstance(found, Mapping):
        raise ValueError(f"a mapping is expected, not {type(found).__name__}")
    return found


def _words(value: Any, what: str) -> str:
    """`value` if it is text; ValueError for a number, null, a list and so on."""
    if not isinstance(value, str):
        raise ValueError(f"{what} is {_shown(value)}, not text. Put it in double quotes")
    return value


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:60]
