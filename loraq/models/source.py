"""The files of a model, in a local folder or hub snapshot, and the hash of its weights.

Network access happens only for a hub model that is not in the local cache.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from loraq.config import ModelConfig
from loraq.errors import LoraqError, near_matches
from loraq.utils.assets import offline, resolve_asset
from loraq.utils.hashing import CHECKSUMS, cached_hash, read_sha256sums

_WEIGHT_FILES = (".safetensors",)
_CONFIG_FILES = (".json", ".model", ".txt")


def resolve_folder(model: ModelConfig) -> Path:
    """The local folder of the model; a hub model is downloaded if it is not in the cache."""
    if model.hub_id is not None:
        return _hub_folder(model.hub_id)
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


def _hub_folder(hub_id: str) -> Path:
    """The snapshot of a hub model, from the local cache or else one download attempt."""
    from huggingface_hub import HfApi, snapshot_download

    wanted = ["*.safetensors", "*.json", "*.txt", "*.model"]
    remedy = (
        "  Use a local copy: model.path=FOLDER model.hub_id=null; or download it to the hub cache "
        "on a machine with network access (hf download " + hub_id + ") and copy the cache."
    )
    try:
        return Path(snapshot_download(hub_id, local_files_only=True, allow_patterns=wanted))
    except Exception:
        if offline():
            raise LoraqError(
                f"model.hub_id={hub_id}: not in the local hub cache, and the environment is set to "
                f"offline (HF_HUB_OFFLINE).\n{remedy}"
            ) from None
    try:
        HfApi().model_info(hub_id, timeout=10)
        return Path(snapshot_download(hub_id, allow_patterns=wanted, etag_timeout=10))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LoraqError(
            f"model.hub_id={hub_id}: not in the local hub cache, and the download failed "
            f"({reason[:160]}).\n{remedy}"
        ) from None


def weights_hash(model: ModelConfig) -> str:
    """sha256 over all weight and config files of the pipeline, in order of their paths.

    LoraqError for a file that does not match the folder's `SHA256SUMS`, if there is one.
    """
    folder = resolve_folder(model)
    endings = _WEIGHT_FILES + _CONFIG_FILES
    files = sorted(path for path in folder.rglob("*") if path.suffix in endings and path.is_file())
    if not any(path.suffix in _WEIGHT_FILES for path in files):
        raise LoraqError(
            f"'{folder}' has no .safetensors file. Pickled weights are not read; save the "
            "pipeline again with safe_serialization=True."
        )
    expected = read_sha256sums(folder)
    total = hashlib.sha256()
    for path in files:
        name = path.relative_to(folder).as_posix()
        digest = cached_hash(path)
        if name in expected and expected[name] != digest:
            raise LoraqError(
                f"'{path}' is damaged: its sha256 is {digest[:16]}…, {CHECKSUMS} says "
                f"{expected[name][:16]}…. Restore the file (git checkout, or copy it again)."
            )
        total.update(f"{name} {digest}\n".encode())
    return total.hexdigest()


def check_weights(folder: Path) -> None:
    """LoraqError for a safetensors file that is truncated or damaged; reads only the headers."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as stream:
                stream.keys()
        except (SafetensorError, OSError, ValueError) as error:
            raise LoraqError(
                f"'{path}' is not a valid safetensors file ({error}; {path.stat().st_size} bytes). "
                "It is corrupted or truncated: restore it, or download it again."
            ) from None
