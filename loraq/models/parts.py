"""The parts of a pipeline without weights, loaded in the plan: tokenizer, scheduler, processors.

They are small, and what keeps one from loading (a missing package, a class of another version of
a library) is told before the weights are downloaded and before anything is computed.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

from loraq.errors import LoraqError
from loraq.models.files import components, has_weights, is_small, read_json, sizes_and_times
from loraq.models.networks import network_class, quiet_transformers
from loraq.utils.texts import first_line

SENTENCEPIECE = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
"""Modules with which transformers reads a tokenizer's `*.model` → the packages that hold them."""


def check_parts(folder: Path) -> None:
    """LoraqError unless all classes in `model_index.json` exist and the parts without weights load.

    Reads configuration files and vocabularies only.
    """
    check_classes(folder)
    for name, (library, class_name) in components(folder).items():
        part = folder / name
        if has_weights(class_name):
            network_class(library, class_name, read_json(part / "config.json"))
        else:
            files = sorted(path for path in part.glob("*") if is_small(path.name))
            _load(part, library, class_name, tuple(files), sizes_and_times(files))


def check_classes(folder: Path) -> None:
    """LoraqError unless diffusers and transformers have all classes in `model_index.json`."""
    for library, class_name in components(folder).values():
        network_class(library, class_name, {})


@functools.lru_cache(maxsize=64)
def _load(
    part: Path,
    library: str,
    class_name: str,
    files: tuple[Path, ...],
    state: tuple[tuple[int, int], ...],
) -> None:
    """Load one part; a success is cached.

    state: `sizes_and_times` of the files, for the cache.
    """
    kind = network_class(library, class_name, {})
    try:
        with quiet_transformers():
            kind.from_pretrained(part, local_files_only=True)
    except Exception as error:
        raise LoraqError(
            f"'{part}' does not load as {class_name} ({first_line(error)[:200]}). {_remedy(files)}"
        ) from error


def _remedy(files: tuple[Path, ...]) -> str:
    names = {path.name for path in files}
    vocabularies = [name for name in names if name.endswith(".model")]
    if vocabularies and "tokenizer.json" not in names:
        lacking = [name for module, name in SENTENCEPIECE.items() if not _installed(module)]
        if lacking:
            return f"Reading {vocabularies[0]} needs a package: pip install {' '.join(lacking)}"
    return "Restore its files, or set model.path to a complete copy of the model."


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package around it
        return False
