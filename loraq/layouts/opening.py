"""Load a packed pipeline or transformer from its folder, in the type of its own 16-bit tensors."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch

import loraq.diffusers_quantizer  # noqa: F401  (diffusers loads packed layers)
from loraq.errors import LoraqError
from loraq.layouts.files import CONFIG, quantization_config, read_config, read_dtypes
from loraq.models.denoisers import TRANSFORMER
from loraq.models.networks import network_class, pipeline_class
from loraq.utils.texts import first_line


def open_checkpoint(folder: str | Path) -> Any:
    """The pipeline or transformer of diffusers in a folder; LoraqError for anything else."""
    folder = Path(folder)
    if (folder / "model_index.json").is_file():
        kind, network = pipeline_class(folder), folder / TRANSFORMER
    elif (folder / CONFIG).is_file():
        config = read_config(folder)
        kind, network = network_class("diffusers", str(config.get("_class_name")), config), folder
    else:
        raise LoraqError(
            f"'{folder}' holds no saved pipeline (model_index.json) and no transformer "
            f"({CONFIG}). Pass the folder of a packed checkpoint."
        )
    try:
        opened = kind.from_pretrained(str(folder), dtype=_dtype(network), local_files_only=True)
    except LoraqError:
        raise
    except Exception as error:
        raise LoraqError(
            f"'{folder}' does not load as {kind.__name__}: {first_line(error)[:300]}\n"
            "  Restore the folder."
        ) from error
    if network != folder:
        opened.set_progress_bar_config(disable=True)  # as every pipeline that is loaded here
    return opened


def _dtype(network: Path) -> torch.dtype:
    """The type of most weights that are not packed: diffusers would make all of them float32."""
    packed = quantization_config(network).get("layers") or {}
    starts = tuple(f"{name}." for name in packed)
    dtypes = read_dtypes(network).items()
    own = Counter(d for name, d in dtypes if not name.startswith(starts))
    return own.most_common(1)[0][0] if own else torch.float32
