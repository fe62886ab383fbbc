"""The one table of prompt sets: the file that holds the prompts, their images, source, licence.

`folder` is what `data.captions` names: a folder in the layout that the publisher's files have once
they are downloaded and unpacked (`loraq fetch SET FOLDER` makes one), or the file itself.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from loraq.data import readers
from loraq.data.manifest import check
from loraq.data.prompt import Prompt
from loraq.data.readers import Reader, UnknownSplit, read_prompts
from loraq.errors import LoraqError, did_you_mean, near_matches, unknown

ImageFile = Callable[[Path, str], Path]  # of a folder and a prompt's name
SUFFIXES: dict[str, Reader] = {
    ".json": readers.mapping,
    ".yaml": readers.mapping,
    ".yml": readers.mapping,
    ".txt": readers.lines,
    ".jsonl": readers.json_lines,
    ".csv": readers.table("prompt", "Prompt", "Prompts", "prompts"),
    ".tsv": readers.table("prompt", "Prompt", "Prompts", "prompts"),
}


def by_suffix(path: Path, split: str) -> list[Prompt]:
    """A user's own list: YAML or JSON (NAME: PROMPT), CSV, TSV, JSON lines, or plain text."""
    if path.suffix not in SUFFIXES:
        raise LoraqError(
            f"'{path}': {unknown('kind of prompt file', path.suffix or path.name, SUFFIXES)}"
        )
    return SUFFIXES[path.suffix](path, split)


@dataclass(frozen=True)
class PromptSet:
    """hub: the data set's repository; files: patterns of what is needed of it; archives: those of
    them to unpack. `first`: a run takes the first prompts, not the reference's shuffled subset."""

    about: str
    prompts: str  # glob of the file in the folder
    read: Reader
    licence: str
    source: str
    hub: str | None = None
    files: tuple[str, ...] = ()
    archives: tuple[str, ...] = ()
    image: ImageFile | None = None
    first: bool = False


def _root(folder: Path, inner: str) -> Path:
    """Where images lie: in the folder that their archive was unpacked to, or in the set's own."""
    return folder / inner if (folder / inner).is_dir() else folder


def mjhq_image(folder: Path, name: str) -> Path:
    category = _mjhq_categories(folder / "meta_data.json")[name]
    return _root(folder, "mjhq30k_imgs") / category / f"{name}.jpg"


@functools.lru_cache(maxsize=4)
def _mjhq_categories(path: Path) -> dict[str, str]:
    found = json.loads(path.read_text(encoding="utf-8"))
    return {name: entry["category"] for name, entry in found.items()}


def sdci_image(folder: Path, name: str) -> Path:
    return _root(folder, "sDCI") / f"{name}.jpg"


def coco_image(folder: Path, name: str) -> Path:
    return folder / ("val2014" if "val2014" in name else "train2014") / f"{name}.jpg"


SETS: dict[str, PromptSet] = {
    "captions": PromptSet(
        "our own captions file, with splits",
        "captions.json",
        readers.captions,
        "of the file",
        "docs/protocol.md",
        first=True,
    ),
    "file": PromptSet(
        "a list of your own: .yaml, .json, .txt, .csv, .tsv or .jsonl",
        "prompts.*",
        by_suffix,
        "of the file",
        "docs/protocol.md",
        first=True,
    ),
    "mjhq": PromptSet(
        "MJHQ-30K: 30,000 prompts with images of ten categories",
        "meta_data.json",
        readers.mjhq,
        "Playground v2.5 Community License",
        "https://huggingface.co/datasets/playgroundai/MJHQ-30K",
        "playgroundai/MJHQ-30K",
        ("meta_data.json", "mjhq30k_imgs.zip"),
        ("mjhq30k_imgs.zip",),
        mjhq_image,
    ),
    "sdci": PromptSet(
        "sDCI: densely captioned images, summarised to 77 tokens",
        "sDCI.yaml",
        readers.mapping,
        "CC BY-NC 4.0",
        "https://huggingface.co/datasets/mit-han-lab/svdquant-datasets",
        "mit-han-lab/svdquant-datasets",
        ("sDCI.yaml", "sDCI.gz"),
        ("sDCI.gz",),
        sdci_image,
    ),
    "coco": PromptSet(
        "COCO 2014 captions in Karpathy's splits (data.split=train | val | test)",
        "dataset_coco.json",
        readers.karpathy,
        "CC BY 4.0 (captions); images: terms of use of Flickr",
        "https://cocodataset.org",
        image=coco_image,
    ),
    "parti": PromptSet(
        "PartiPrompts: about 1,600 prompts, no images",
        "PartiPrompts.tsv",
        readers.table("Prompt"),
        "Apache-2.0",
        "https://huggingface.co/datasets/nateraw/parti-prompts",
        "nateraw/parti-prompts",
        ("PartiPrompts.tsv",),
    ),
    "drawbench": PromptSet(
        "DrawBench: 200 prompts, no images",
        "*.csv",
        readers.table("Prompts", "prompts", "Prompt"),
        "not stated",
        "https://huggingface.co/datasets/sayakpaul/drawbench",
        "sayakpaul/drawbench",
        ("*.csv",),
    ),
    "geneval": PromptSet(
        "GenEval: 553 prompts about objects, counts, colours and places, no images",
        "evaluation_metadata.jsonl",
        readers.json_lines,
        "MIT",
        "https://github.com/djghosh13/geneval (prompts/evaluation_metadata.jsonl)",
    ),
}


def prompt_set(name: str, key: str = "data.set") -> PromptSet:
    """LoraqError for an unknown set, with near matches."""
    if name not in SETS:
        raise LoraqError(f"{key}: {unknown('prompt set', name, SETS)}")
    return SETS[name]


def prompts_of(name: str, path: Path, split: str, key: str) -> list[Prompt]:
    """All prompts of a set (of its split, where it has any) in the order of its file.

    key: the settings that asked for it, `data` or `calibration`, for errors.
    """
    file = prompts_file(name, path, key)
    try:
        return read_prompts(prompt_set(name, f"{key}.set").read, file, split)
    except LoraqError as error:
        setting = "split" if isinstance(error, UnknownSplit) else "captions"
        raise LoraqError(f"{key}.{setting}: {error}") from None


def prompts_file(name: str, path: Path, key: str) -> Path:
    """The file that holds a set's prompts; LoraqError where it is not there or not whole."""
    chosen = prompt_set(name)
    if path.is_file():
        return path
    if not path.is_dir():
        beside = [f.name for f in path.parent.iterdir()] if path.parent.is_dir() else []
        close = [f"'{path.parent / found}'" for found in near_matches(path.name, beside)]
        raise LoraqError(
            f"{key}.captions: there is no file '{path}'.{did_you_mean(close)} {remedy(name, path)}"
        )
    check(path)
    files = sorted(path.glob(chosen.prompts))
    if len(files) != 1:
        found = f"{len(files)} of them" if files else "none"
        raise LoraqError(
            f"{key}.captions={path}: set '{name}' wants one file {chosen.prompts} there, and there "
            f"is {found}. {remedy(name, path)}"
        )
    return files[0]


def remedy(name: str, path: Path) -> str:
    """How to come by a set's files."""
    chosen = prompt_set(name)
    if chosen.hub is not None:
        return f"`loraq fetch {name} {path}` downloads it; or give the folder that holds it."
    if name in ("captions", "file"):
        return f"Give {chosen.about}."
    return f"Get it from {chosen.source}, and give the folder that holds {chosen.prompts}."


def set_images(name: str, folder: Path, names: Sequence[str]) -> list[Path]:
    """The real images of these prompts; LoraqError where a set has none, or some are missing."""
    chosen = prompt_set(name)
    if chosen.image is None:
        raise LoraqError(
            f"data.real=set: set '{name}' has no images. Set data.real=null, and metrics=paired to "
            "leave out what compares with real images."
        )
    if not folder.is_dir():
        raise LoraqError(
            f"data.real=set: data.captions={folder} is no folder with the set's images. "
            f"{remedy(name, folder)}"
        )
    paths = [chosen.image(folder, entry) for entry in names]
    if missing := [path for path in paths if not path.is_file()]:
        raise LoraqError(
            f"data.real=set: {len(missing)} of {len(paths)} images of '{name}' are missing, the "
            f"first '{missing[0]}'. {remedy(name, folder)}"
        )
    return paths
