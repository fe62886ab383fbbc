"""The files of a pipeline in `save_pretrained` layout: which ones are read, and what is wrong.

Reads directories, JSON files and headers of safetensors files; imports neither torch nor diffusers.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from loraq.errors import LoraqError

STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
"""Library → the name of a component's weight file without its ending."""
_WITHOUT_WEIGHTS = re.compile(
    r"(Scheduler|(?<!Audio)Tokenizer(Fast)?|TokenizersBackend|Processor(Fast)?|Extractor|Guidance)$"
)
_CONFIGS = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}
SMALL = (".json", ".model", ".txt", ".jinja")
"""Endings of configurations and vocabularies."""
WEIGHTS = ".safetensors"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_NO_VOCABULARY = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_LFS_POINTER = b"version https://git-lfs"
_VARIANT = re.compile(r"\.(\w+)(?=[.-])")
_PLAIN_WEIGHTS = re.compile(r"[^.]+?(-\d{5}-of-\d{5})?\.safetensors")

Header = dict[str, tuple[str, tuple[int, ...]]]
"""Tensor name → (dtype as safetensors names it, shape)."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model; LoraqError if it is missing or damaged."""
    if problem := file_problem(path):
        raise LoraqError(f"'{path}' {problem}. Restore the model's folder.")
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise LoraqError(
            f"'{path}' cannot be read ({error}). Restore the model's folder."
        ) from None
    if not isinstance(values, dict):
        raise LoraqError(f"'{path}' holds no JSON object. Restore the model's folder.")
    return values


def components(folder: Path) -> dict[str, tuple[str, str]]:
    """Component → (library, class) as `model_index.json` lists them, without absent ones."""
    listed = read_json(folder / "model_index.json").items()
    pairs = {name: tuple(entry) for name, entry in listed if isinstance(entry, list)}
    return {name: pair for name, pair in pairs.items() if len(pair) == 2 and all(pair)}


def has_weights(class_name: str) -> bool:
    """Whether a component of this class is a network: no scheduler, tokenizer or processor."""
    return _WITHOUT_WEIGHTS.search(class_name) is None


def is_small(name: str) -> bool:
    """Whether a file is a configuration or a vocabulary, by its name."""
    return name.endswith(SMALL)


def weight_files(
    folder: Path, library: str, variant: str | None = None, listed: Collection[str] | None = None
) -> list[Path]:
    """The files that a component's weights are read from: one file, or the shards of an index.

    Files of the variant are preferred to those without one, as in diffusers; those without one are
    read only if they are all there. Files that do not exist are part of the list.

    listed: names of the component's files in a repository, of which `folder` need hold only the
        indices; by default those in `folder`.
    """
    names = _names(folder) if listed is None else listed
    plain = f"{STEMS.get(library, STEMS['diffusers'])}{WEIGHTS}"
    wanted, choices = plain, [(plain, f"{plain}.index.json")]
    if variant is not None:
        wanted = f"{plain.removesuffix(WEIGHTS)}.{variant}{WEIGHTS}"
        older = (wanted, f"{plain}.{variant}.index.json")
        choices = [(wanted, f"{plain}.index.{variant}.json"), older, *choices]
    for single, index in choices:
        if index in names and (library == "diffusers" or single not in names):
            shards = _shards(folder / index)
            if single == wanted or {path.name for path in shards} <= {*names}:
                return shards
        elif single in names:
            return [folder / single]
    return [folder / wanted]


def _names(folder: Path) -> list[str]:
    """The names of the files in a folder, dangling links included; none without the folder."""
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def _shards(index: Path) -> list[Path]:
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise LoraqError(
            f"'{index}' has no weight_map, which names the files of the weights. Restore the "
            "model's folder."
        )
    return [index.with_name(name) for name in sorted(set(named.values()))]


def absent_weights(wanted: str, names: Iterable[str]) -> str:
    """What is wrong if a component has no weight file `wanted`, but files of these `names`."""
    names = sorted(names)
    variants = _variants(names)
    if variants and not _VARIANT.search(wanted):
        return (
            f"is missing; there are weights of the variant {' and '.join(variants)}. Set "
            f"model.variant={variants[0]}"
        )
    if pickled := [name for name in names if name.endswith(_PICKLED)]:
        return (
            f"is missing; '{pickled[0]}' is pickled and is not read, because reading it can run "
            "any code. Save the pipeline again with safe_serialization=True"
        )
    return "is missing"


def _variants(names: Iterable[str]) -> list[str]:
    """The variants of weight files, such as bf16."""
    infixes = (_VARIANT.search(Path(name).name) for name in names if name.endswith(WEIGHTS))
    return sorted({match[1] for match in infixes if match})


def read_header(path: Path) -> Header:
    """The tensors of a safetensors file; LoraqError if it is truncated or damaged."""
    from safetensors import SafetensorError, safe_open

    if problem := file_problem(path):
        raise LoraqError(f"'{path}' {problem}. Restore it, or download it again.")
    try:
        with safe_open(path, framework="np") as stream:
            parts = {name: stream.get_slice(name) for name in stream.keys()}  # noqa: SIM118
            return {n: (part.get_dtype(), tuple(part.get_shape())) for n, part in parts.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise LoraqError(
            f"'{path}' is not a valid safetensors file ({error}; {path.stat().st_size} bytes). "
            "It is corrupted or truncated: restore it, or download it again."
        ) from None


def sizes_and_times(files: Iterable[Path]) -> tuple[tuple[int, int], ...]:
    """Bytes and modification times of files, for caches of what was found in them."""
    return tuple((path.stat().st_size, path.stat().st_mtime_ns) for path in files)


def file_problem(path: Path) -> str | None:
    """What is wrong with a file as such, for an error ("'PATH' is missing"); None if nothing."""
    if not path.is_file():
        if path.is_symlink():
            return "is a link to a file that does not exist (an incomplete copy of the hub cache?)"
        return "is missing"
    with open(path, "rb") as stream:
        start = stream.read(len(_LFS_POINTER))
    if not start:
        return "is empty"
    if start == _LFS_POINTER:
        return "is a pointer of git-lfs and not the file itself (run `git lfs pull` in the clone)"
    return None


def file_problems(
    folder: Path, variant: str | None, only: Collection[str] | None = None
) -> dict[str, str]:
    """File → what is wrong with it, of all files that the components (`only` these) are read from.

    LoraqError for a damaged `model_index.json`, or for an index of shards that cannot be read.
    """
    if problem := file_problem(folder / "model_index.json"):
        return {"model_index.json": problem}
    found = {}
    for name, (library, class_name) in components(folder).items():
        if only is None or name in only:
            for path in _component_files(folder, name, library, class_name, variant):
                if problem := file_problem(path):
                    if not os.path.lexists(path) and path.suffix == WEIGHTS:
                        problem = absent_weights(path.name, _names(path.parent))
                    found[path.relative_to(folder).as_posix()] = problem
    return found


def _component_files(
    folder: Path, name: str, library: str, class_name: str, variant: str | None
) -> Iterator[Path]:
    """Files of a component: those that must be there, and all others that are not weights."""
    part = folder / name
    there = sorted(part.iterdir()) if part.is_dir() else []
    yield from (path for path in there if is_small(path.name))
    network = has_weights(class_name)
    configs = {"": "config.json"} if network else _CONFIGS
    for start, config in configs.items():
        if name.startswith(start) and not os.path.lexists(part / config):
            yield part / config
    if network:
        yield from weight_files(part, library, variant)
    elif name.startswith("tokenizer") and all(path.name in _NO_VOCABULARY for path in there):
        yield part / "tokenizer.json"


def used_files(names: Iterable[str], parts: Collection[str], variant: str | None) -> list[str]:
    """The names without weights that are not read: other variants, files outside of components.

    names: paths within the pipeline's folder. parts: its components. Repositories often hold the
    network again as one file for other programs. LoraqError if no component has the variant.
    """
    names = sorted(
        name for name in names if not name.endswith(WEIGHTS) or name.partition("/")[0] in parts
    )
    weights = [name for name in names if name.endswith(WEIGHTS)]
    of_variant = re.compile(rf"\.{re.escape(variant or '')}(?=[.-])")
    chosen = {name for name in weights if variant and of_variant.search(Path(name).name)}
    if variant and not chosen:
        raise LoraqError(
            f"model.variant={variant}: no weight file has this variant. Variants of this model: "
            f"{', '.join(_variants(weights)) or 'none'}. Set model.variant to one of them, or to "
            "null."
        )
    with_it = {Path(name).parent for name in chosen}
    return [
        name
        for name in names
        if name not in weights
        or name in chosen
        or (Path(name).parent not in with_it and _PLAIN_WEIGHTS.fullmatch(Path(name).name))
    ]
