"""The table of prompt sets: prompt file, images, source and licence.

`data.captions` names the folder of a set, with the publisher's files as downloaded and unpacked by
`loraq fetch SET FOLDER`, or the prompt file itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from loraq.data import readers
from loraq.data.manifest import check_complete
from loraq.data.prompt import Prompt
from loraq.data.readers import Reader, UnknownSplit, read_prompts
from loraq.errors import LoraqError, did_you_mean, near_matches, unknown

ImagePath = Callable[[Path, str], Path]  # (folder, prompt's name) → image file
SUFFIXES: dict[str, Reader] = {
    ".json": readers.mapping,
    ".yaml": readers.mapping,
    ".yml": readers.mapping,
    ".txt": readers.lines,
    ".jsonl": readers.json_lines,
    ".csv": readers.table("prompt", "Prompt", "Prompts", "prompts"),
    ".tsv": readers.table("prompt", "Prompt", "Prompts", "prompts"),
}


def read_by_suffix(path: Path, split: str) -> list[Prompt]:
    """A user's list: YAML or JSON (NAME: PROMPT), CSV, TSV, JSON lines, or plain text."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise LoraqError(
            f"'{path}': {unknown('kind of prompt file', path.suffix or path.name, SUFFIXES)}"
        )
    return SUFFIXES[suffix](path, split)


@dataclass(frozen=True)
class PromptSet:
    """A row of the table.

    prompts: glob of the prompt file in the folder.
    hub, files, archives: the repository on the hub, patterns of its files to download, and those of
        the files to unpack.
    url, size, sha256: one file that is not on the hub, its bytes and checksum.
    first: a run uses the first prompts instead of the SVDQuant reference's subset.
    """

    about: str
    prompts: str
    read: Reader
    licence: str
    source: str
    hub: str | None = None
    url: str | None = None
    size: int = 0
    sha256: str = ""
    files: tuple[str, ...] = ()
    archives: tuple[str, ...] = ()
    image: ImagePath | None = None
    first: bool = False

    def __repr__(self) -> str:
        return f"PromptSet({self.about!r})"


def _image_folder(folder: Path, inner: str) -> Path:
    """The folder of the images: that of the unpacked archive, else the set's folder."""
    return folder / inner if (folder / inner).is_dir() else folder


def mjhq_image(folder: Path, name: str) -> Path:
    category = readers.mjhq_categories(folder / "meta_data.json")[name]
    return _image_folder(folder, "mjhq30k_imgs") / category / f"{name}.jpg"


def sdci_image(folder: Path, name: str) -> Path:
    return _image_folder(folder, "sDCI") / f"{name}.jpg"


def coco_image(folder: Path, name: str) -> Path:
    return folder / ("val2014" if "val2014" in name else "train2014") / f"{name}.jpg"


SETS: dict[str, PromptSet] = {
    "captions": PromptSet(
        "a captions file of this project, with splits",
        "captions.json",
        readers.captions,
        "of the file",
        "docs/protocol.md",
        first=True,
    ),
    "file": PromptSet(
        "your own list: .yaml, .json, .txt, .csv, .tsv or .jsonl",
        "prompts.*",
        read_by_suffix,
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
        hub="playgroundai/MJHQ-30K",
        files=("meta_data.json", "mjhq30k_imgs.zip"),
        archives=("mjhq30k_imgs.zip",),
        image=mjhq_image,
    ),
    "sdci": PromptSet(
        "sDCI: densely captioned images, summarised to 77 tokens",
        "sDCI.yaml",
        readers.mapping,
        "CC BY-NC 4.0",
        "https://huggingface.co/datasets/mit-han-lab/svdquant-datasets",
        hub="mit-han-lab/svdquant-datasets",
        files=("sDCI.yaml", "sDCI.gz"),
        archives=("sDCI.gz",),
        image=sdci_image,
    ),
    "coco": PromptSet(
        "COCO 2014 captions in Karpathy's splits (data.split=train | val | test)",
        "dataset_coco.json",
        readers.karpathy,
        "CC BY 4.0 (captions); images: terms of use of Flickr",
        "https://cocodataset.org",
        image=coco_image,
    ),
    "qdiff": PromptSet(
        "qdiff: the SVDQuant reference's 1024 calibration captions, of COCO; no images",
        "qdiff.yaml",
        readers.mapping,
        "CC BY 4.0 (captions of COCO); the file's repository: Apache-2.0",
        "https://github.com/mit-han-lab/deepcompressor (examples/diffusion/prompts/qdiff.yaml)",
        url="https://raw.githubusercontent.com/mit-han-lab/deepcompressor/"
        "69f3473f5e1c1504bae35cc50c7858ef900a9b17/examples/diffusion/prompts/qdiff.yaml",
        files=("qdiff.yaml",),
        size=62384,
        sha256="54da57563342ef07e2bc0fddf1d224823f55cdd93a75b88df8f293d88da1a361",
    ),
    "parti": PromptSet(
        "PartiPrompts: about 1,600 prompts, no images",
        "PartiPrompts.tsv",
        readers.table("Prompt", quoted=False),  # some prompts start with a quote
        "Apache-2.0",
        "https://huggingface.co/datasets/nateraw/parti-prompts",
        hub="nateraw/parti-prompts",
        files=("PartiPrompts.tsv",),
    ),
    "drawbench": PromptSet(
        "DrawBench: 200 prompts, no images",
        "*.csv",
        readers.table("Prompts", "prompts", "Prompt"),
        "not stated",
        "https://huggingface.co/datasets/sayakpaul/drawbench",
        hub="sayakpaul/drawbench",
        files=("*.csv",),
    ),
    "geneval": PromptSet(
        "GenEval: 553 prompts about objects, counts, colours and places, no images",
        "evaluation_metadata.jsonl",
        readers.json_lines,
        "MIT",
        "https://github.com/djghosh13/geneval (prompts/evaluation_metadata.jsonl)",
    ),
}


def find_prompt_set(name: str, key: str = "data.set") -> PromptSet:
    """The row of a set; LoraqError with near matches for an unknown name.

    key: the setting that contains the name, for the error.
    """
    if name not in SETS:
        raise LoraqError(f"{key}: {unknown('prompt set', name, SETS)}")
    return SETS[name]


def read_prompt_set(name: str, path: Path, split: str, key: str) -> list[Prompt]:
    """All prompts of a set, or of its split, in the order of the file.

    key: the group of settings, `data` or `calibration`, for errors.
    """
    file = find_prompt_file(name, path, key)
    try:
        return read_prompts(find_prompt_set(name, f"{key}.set").read, file, split)
    except LoraqError as error:
        setting = "split" if isinstance(error, UnknownSplit) else "captions"
        raise LoraqError(f"{key}.{setting}: {error}") from None


def find_prompt_file(name: str, path: Path, key: str) -> Path:
    """The file with a set's prompts; LoraqError if it is missing or incomplete."""
    chosen = find_prompt_set(name)
    if path.is_file():
        return path
    if not path.is_dir():
        siblings = [f.name for f in path.parent.iterdir()] if path.parent.is_dir() else []
        close = [f"'{path.parent / found}'" for found in near_matches(path.name, siblings)]
        raise LoraqError(
            f"{key}.captions: '{path}' does not exist.{did_you_mean(close)} "
            f"{how_to_get(name, path)}"
        )
    check_complete(path)
    files = sorted(path.glob(chosen.prompts))
    if len(files) != 1:
        raise LoraqError(
            f"{key}.captions={path}: set '{name}' needs one file {chosen.prompts}; the folder has "
            f"{len(files) or 'none'}. {how_to_get(name, path)}"
        )
    return files[0]


def how_to_get(name: str, path: Path) -> str:
    """The sentence that says how to get a set's files, for errors."""
    chosen = find_prompt_set(name)
    if chosen.hub is not None or chosen.url is not None:
        return f"`loraq fetch {name} {path}` downloads it; or set the folder that contains it."
    if name in ("captions", "file"):
        return f"Set it to {chosen.about}."
    return f"Get it from {chosen.source}, and set the folder that contains {chosen.prompts}."


def real_image_paths(name: str, folder: Path, names: Sequence[str]) -> list[Path]:
    """The real images of these prompts; LoraqError if the set has none, or some are missing."""
    chosen = find_prompt_set(name)
    if chosen.image is None:
        raise LoraqError(
            f"data.real=set: set '{name}' has no images. Set data.real=null, and metrics=paired to "
            "leave out the metrics that compare with real images."
        )
    if not folder.is_dir():
        raise LoraqError(
            f"data.real=set: data.captions={folder} is not a folder with the set's images. "
            f"{how_to_get(name, folder)}"
        )
    paths = [chosen.image(folder, entry) for entry in names]
    if missing := [path for path in paths if not path.is_file()]:
        raise LoraqError(
            f"data.real=set: {len(missing)} of {len(paths)} images of '{name}' are missing, the "
            f"first '{missing[0]}'. {how_to_get(name, folder)}"
        )
    return paths
