"""Load a diffusers pipeline, or its transformer without weights; no remote code, no pickles."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Sequence
from typing import Any

from loraq.config import ModelConfig
from loraq.errors import LoraqError, unknown
from loraq.models.layers import family
from loraq.models.source import check_weights, resolve_folder

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
