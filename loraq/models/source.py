"""The folder of a model, a local one or a hub snapshot, and the hash of its weights.

Network access happens only for a hub model that is not completely in the local cache.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from loraq.config import ModelConfig
from loraq.errors import LoraqError, near_matches
from loraq.models import hub
from loraq.models.family import find_family
from loraq.models.files import SMALL, WEIGHTS, components, used_files
from loraq.models.networks import pipeline_class
from loraq.utils.assets import resolve_asset
from loraq.utils.hashing import CHECKSUMS, cached_hash, read_sha256sums

READERS = 4
"""Files that are hashed at a time."""


def resolve_folder(model: ModelConfig) -> Path:
    """The local folder of the model; a hub model is downloaded if it is not in the cache."""
    if model.hub_id is not None:
        return hub.hub_folder(model)
    assert model.path is not None
    folder = resolve_asset(model.path)
    if not folder.is_dir():
        around = folder.parent
        names = [entry.name for entry in around.iterdir()] if around.is_dir() else []
        close = near_matches(folder.name, names)
        raise LoraqError(
            f"model.path={model.path}: folder '{folder}' does not exist."
            + (f" Similar names: {', '.join(close)}." if close else "")
            + "\n  Give a folder in save_pretrained layout, asset:NAME for a model in the package, "
            "or model.path=null model.hub_id=OWNER/NAME."
        )
    if not (folder / "model_index.json").is_file():
        raise LoraqError(
            f"model.path={model.path}: '{folder}' has no model_index.json, so it is not a pipeline "
            "in save_pretrained layout. Give the folder that contains that file."
        )
    return folder


def config_folder(model: ModelConfig) -> Path:
    """The folder with at least the model's configurations; no weights are downloaded."""
    return resolve_folder(model) if model.hub_id is None else hub.config_folder(model)


def pipeline_of(model: ModelConfig) -> Any:
    """The class of the model's pipeline in diffusers, from its `model_index.json`.

    LoraqError if the model's family is for other classes.
    """
    folder = config_folder(model)
    found, wanted = pipeline_class(folder), find_family(model.family).PIPELINES
    if wanted and found.__name__ not in wanted:
        raise LoraqError(
            f"'{folder}' is a {found.__name__}; family '{model.family}' loads "
            f"{' or '.join(wanted)}. Set model.family to the model's family (auto finds it), "
            "model.path to another folder, or model=hub, which reads all settings from it."
        )
    return found


def model_commit(model: ModelConfig) -> str | None:
    """The commit of a hub model's files; None for a folder."""
    return None if model.hub_id is None else resolve_folder(model).name


def weights_hash(model: ModelConfig) -> str:
    """sha256 over all weight and config files of the pipeline, in order of their paths.

    Weights of variants other than `model.variant` and those outside of components are not read and
    are left out. LoraqError for a file that does not match the folder's `SHA256SUMS`, if there is
    one.
    """
    folder = resolve_folder(model)
    files = _model_files(folder)
    if not any(path.suffix == WEIGHTS for path in files):
        raise LoraqError(
            f"'{folder}' has no .safetensors file. Pickled weights are not read; save the "
            "pipeline again with safe_serialization=True."
        )
    names = (path.relative_to(folder).as_posix() for path in files)
    files = [folder / name for name in used_files(names, components(folder), model.variant)]
    expected = read_sha256sums(folder)
    total = hashlib.sha256()
    with ThreadPoolExecutor(READERS) as pool:  # hashing lets other threads run
        digests = list(pool.map(cached_hash, files))
    for path, digest in zip(files, digests, strict=True):
        name = path.relative_to(folder).as_posix()
        if name in expected and expected[name] != digest:
            raise LoraqError(
                f"'{path}' is damaged: its sha256 is {digest[:16]}…, {CHECKSUMS} says "
                f"{expected[name][:16]}…. Restore the file (git checkout, or copy it again)."
            )
        total.update(f"{name} {digest}\n".encode())
    return total.hexdigest()


def _model_files(folder: Path) -> list[Path]:
    """All files of weights and configurations, also those of a component that is a link."""
    found: list[Path] = []
    for entry in folder.iterdir():  # `rglob` does not enter links to folders
        found += [entry] if entry.is_file() else entry.rglob("*")
    return sorted(path for path in found if path.suffix in (WEIGHTS, *SMALL) and path.is_file())
