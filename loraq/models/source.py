"""The folder of a model, a local one or a hub snapshot, and the hash of its weights.

Network access happens only for a hub model that is not completely in the local cache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from loraq.config import ModelConfig
from loraq.errors import LoraqError, near_matches
from loraq.models.files import file_problems, used_files
from loraq.utils.assets import offline, resolve_asset
from loraq.utils.hashing import CHECKSUMS, cached_hash, read_sha256sums

READERS = 4
"""Files that are hashed at a time."""
_WEIGHT_FILES = (".safetensors",)
_CONFIG_FILES = (".json", ".model", ".txt")


def resolve_folder(model: ModelConfig) -> Path:
    """The local folder of the model; a hub model is downloaded if it is not in the cache."""
    if model.hub_id is not None:
        return _hub_folder(model.hub_id, model.variant)
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


def _hub_folder(hub_id: str, variant: str | None) -> Path:
    """The snapshot of a hub model, from the local cache; missing files are downloaded."""
    from huggingface_hub import snapshot_download

    remedy = (
        "  Use a local copy: model.path=FOLDER model.hub_id=null; or download it to the hub cache "
        "on a machine with network access (hf download " + hub_id + ") and copy the cache."
    )
    state = "not in the local hub cache"
    try:  # an incomplete snapshot is found as well
        found = snapshot_download(hub_id, local_files_only=True, allow_patterns="model_index.json")
    except Exception:
        found = None
    if found is not None:
        problems = file_problems(Path(found), variant)
        if not problems:
            return Path(found)
        state = f"its snapshot '{found}' is incomplete: {listed_problems(problems)}"
    if offline():
        raise LoraqError(
            f"model.hub_id={hub_id}: {state}, and the environment is set to offline "
            f"(HF_HUB_OFFLINE).\n{remedy}"
        )
    try:
        commit = None if found is None else Path(found).name  # of the snapshot to complete
        folder = _download(hub_id, variant, commit)
    except LoraqError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LoraqError(
            f"model.hub_id={hub_id}: {state}, and the download failed ({reason[:160]}).\n{remedy}"
        ) from None
    if problems := file_problems(folder, variant):
        raise LoraqError(
            f"model.hub_id={hub_id}: '{folder}' lacks files of the pipeline after the download: "
            f"{listed_problems(problems)}\n  Delete damaged files and run again. Files that the "
            "repository does not have cannot be read: use a local copy, model.path=FOLDER "
            "model.hub_id=null, saved with safe_serialization=True."
        )
    return folder


def _download(hub_id: str, variant: str | None, commit: str | None) -> Path:
    """Download a hub model's files; of its weights, all variants or those that are read."""
    from huggingface_hub import HfApi, snapshot_download

    wanted = [f"*{ending}" for ending in _WEIGHT_FILES + _CONFIG_FILES]
    about = HfApi().model_info(hub_id, revision=commit, timeout=10)
    if variant is not None:
        names = [entry.rfilename for entry in about.siblings or ()]
        wanted = used_files(
            [n for n in names if n.endswith(_WEIGHT_FILES + _CONFIG_FILES)], variant
        )
    return Path(snapshot_download(hub_id, revision=commit, allow_patterns=wanted, etag_timeout=10))


def listed_problems(problems: Mapping[str, str]) -> str:
    """'unet/config.json is missing; vae/… is empty (5 more)'."""
    shown = "; ".join(f"{name} {problem}" for name, problem in list(problems.items())[:3])
    return shown + (f" ({len(problems) - 3} more)" if len(problems) > 3 else "")


def weights_hash(model: ModelConfig) -> str:
    """sha256 over all weight and config files of the pipeline, in order of their paths.

    With `model.variant`, without the weights of other variants. LoraqError for a file that does
    not match the folder's `SHA256SUMS`, if there is one.
    """
    folder = resolve_folder(model)
    endings = _WEIGHT_FILES + _CONFIG_FILES
    files = sorted(path for path in folder.rglob("*") if path.suffix in endings and path.is_file())
    if not any(path.suffix in _WEIGHT_FILES for path in files):
        raise LoraqError(
            f"'{folder}' has no .safetensors file. Pickled weights are not read; save the "
            "pipeline again with safe_serialization=True."
        )
    if model.variant is not None:
        names = (path.relative_to(folder).as_posix() for path in files)
        files = [folder / name for name in used_files(names, model.variant)]
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
