"""From a folder or a hub id to a pipeline: safetensors only, no remote code, hash of the weights.

The network is used only where a config names a hub model that is not in the local cache.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loraq.config import ModelConfig
from loraq.errors import LoraqError, near_matches, unknown
from loraq.models.families import family
from loraq.utils.assets import offline, resolve_asset
from loraq.utils.hashing import CHECKSUMS, cached_hash, read_sha256sums

_WEIGHT_FILES = (".safetensors",)
_CONFIG_FILES = (".json", ".model", ".txt")


def resolve_folder(model: ModelConfig) -> Path:
    """The local folder of the model; downloads it first if the config names a hub id."""
    if model.hub_id is not None:
        return _hub_folder(model.hub_id)
    assert model.path is not None
    folder = resolve_asset(model.path)
    if not folder.is_dir():
        around = folder.parent
        names = [entry.name for entry in around.iterdir()] if around.is_dir() else []
        close = near_matches(folder.name, names)
        raise LoraqError(
            f"model.path={model.path}: there is no folder '{folder}'."
            + (f" Beside it: {', '.join(close)}." if close else "")
            + "\n  Give a folder in save_pretrained layout, asset:NAME for one of the package's, "
            "or model.path=null model.hub_id=OWNER/NAME."
        )
    if not (folder / "model_index.json").is_file():
        raise LoraqError(
            f"model.path={model.path}: '{folder}' has no model_index.json, so it is no pipeline "
            "in save_pretrained layout. Give the folder that holds that file."
        )
    return folder


def _hub_folder(hub_id: str) -> Path:
    """The snapshot of a hub model: from the local cache, else one quick try at the network."""
    from huggingface_hub import HfApi, snapshot_download

    wanted = ["*.safetensors", "*.json", "*.txt", "*.model"]
    remedy = (
        "  Use a copy instead: model.path=FOLDER model.hub_id=null; or put it into the local hub "
        "cache on a machine with network (hf download " + hub_id + ") and copy that."
    )
    try:
        return Path(snapshot_download(hub_id, local_files_only=True, allow_patterns=wanted))
    except Exception:
        if offline():
            raise LoraqError(
                f"model.hub_id={hub_id}: not in the local hub cache, and the environment says "
                f"offline (HF_HUB_OFFLINE).\n{remedy}"
            ) from None
    try:
        HfApi().model_info(hub_id, timeout=10)
        return Path(snapshot_download(hub_id, allow_patterns=wanted, etag_timeout=10))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LoraqError(
            f"model.hub_id={hub_id}: not in the local hub cache, and the hub does not answer "
            f"({reason[:160]}).\n{remedy}"
        ) from None


def weights_hash(model: ModelConfig) -> str:
    """sha256 over every weight and config file of the pipeline, in order of their paths.

    A folder that carries `SHA256SUMS` is checked against it: a damaged file raises.
    """
    folder = resolve_folder(model)
    endings = _WEIGHT_FILES + _CONFIG_FILES
    files = sorted(path for path in folder.rglob("*") if path.suffix in endings and path.is_file())
    if not any(path.suffix in _WEIGHT_FILES for path in files):
        raise LoraqError(
            f"'{folder}' holds no .safetensors file. Pickled weights are not read; save the "
            "pipeline again with safe_serialization=True."
        )
    expected = read_sha256sums(folder)
    total = hashlib.sha256()
    for path in files:
        name = path.relative_to(folder).as_posix()
        digest = cached_hash(path)
        if name in expected and expected[name] != digest:
            raise LoraqError(
                f"'{path}' is damaged: sha256 {digest[:16]}… where {CHECKSUMS} says "
                f"{expected[name][:16]}…. Restore the file (git checkout, or copy it again)."
            )
        total.update(f"{name} {digest}\n".encode())
    return total.hexdigest()


def check_weights(folder: Path) -> None:
    """Reads the header of every safetensors file: a truncated or foreign file raises by name."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as stream:
                stream.keys()
        except (SafetensorError, OSError, ValueError) as error:
            raise LoraqError(
                f"'{path}' is no whole safetensors file ({error}; {path.stat().st_size} bytes). "
                "It is corrupted or cut short: restore it, or download it again."
            ) from None


OURS = {
    "prompt": "prompts come from data=…",
    "num_inference_steps": "set model.steps",
    "guidance_scale": "set model.guidance",
    "height": "set model.height",
    "width": "set model.width",
    "max_sequence_length": "set model.max_sequence_length",
    "generator": "every image has a seed of its own (generate.seed)",
    "output_type": "images are kept as PNG",
}
"""Arguments of the pipeline's call that runs set themselves, and what to set instead."""


def load_pipeline(
    model: ModelConfig, device: str = "cpu", without: Sequence[str] = (), **given: Any
) -> Any:
    """The unmodified diffusers pipeline, in the config's dtype, quiet, on `device`.

    Components named in `without` are None in it, and never read; `given` ones are taken as they
    are.
    """
    import torch

    folder = resolve_folder(model)
    check_weights(folder)
    table = family(model.family)
    named = json.loads((folder / "model_index.json").read_text()).get("_class_name")
    if named != table.PIPELINE:
        raise LoraqError(
            f"'{folder}' is a {named}; family '{model.family}' loads {table.PIPELINE}. "
            "Set model.family to the model's own, or point model.path elsewhere."
        )
    diffusers = quiet_diffusers()
    import loraq.diffusers_quantizer  # noqa: F401 (a packed transformer loads as well)

    pipeline = getattr(diffusers, table.PIPELINE)
    _check_call(model, pipeline)
    try:
        pipe = pipeline.from_pretrained(
            str(folder),
            dtype=getattr(torch, model.dtype),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            **dict.fromkeys(without),
            **given,
        )
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LoraqError(
            f"'{folder}' does not load as {table.PIPELINE}: {reason[:300]}\n"
            "  Restore the folder, or point model.path at a whole one."
        ) from error
    pipe.set_progress_bar_config(disable=True)
    if pipe.vae is not None:
        pipe.vae.enable_slicing()  # one image at a time: its bits do not depend on its batch
    pipe.to(device)
    return pipe


def _check_call(model: ModelConfig, pipeline: Any) -> None:
    """LoraqError for an argument in `model.call` that the pipeline ignores or that we set."""
    known = [
        name
        for name, parameter in inspect.signature(pipeline.__call__).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD and name not in ("self", *OURS)
    ]
    for name in model.call:
        if name in OURS:
            raise LoraqError(
                f"model.call.{name}={model.call[name]!r}: {OURS[name]}. Leave it out of model.call."
            )
        if name not in known:
            raise LoraqError(
                f"model.call: {unknown(f'argument of {pipeline.__name__}', name, known)}"
            )
    if model.call.get("negative_prompt") and model.guidance <= 1:
        raise LoraqError(
            f"model.call.negative_prompt has no effect with model.guidance={model.guidance:g}: the "
            "limit is above 1. Raise it, or leave the negative prompt out."
        )


def quiet_diffusers() -> Any:
    """diffusers, without the notes of optional packages at import and without its own bars."""
    import logging

    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    return diffusers


def meta_transformer(model: ModelConfig, buffers: bool = False) -> Any:
    """The transformer without its weights (meta tensors), to list and count its layers.

    buffers: real ones, such as position tables that no file holds.
    """
    from accelerate import init_empty_weights

    table = family(model.family)
    config = resolve_folder(model) / "transformer" / "config.json"
    try:
        values = json.loads(config.read_text())
    except (OSError, ValueError) as error:
        raise LoraqError(
            f"'{config}' cannot be read ({error}). Restore the model's folder."
        ) from None
    if packed := values.get("quantization_config"):
        raise LoraqError(
            f"'{config.parent}' is quantised already ({packed.get('quant_method')}). Point "
            "model.path at the 16-bit model; or measure this one: loraq score FOLDER."
        )
    diffusers = quiet_diffusers()
    with init_empty_weights(include_buffers=not buffers):
        return getattr(diffusers, table.TRANSFORMER).from_config(values)
