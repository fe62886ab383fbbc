"""The libraries that read networks which others have quantised, by `quantization_config`.

diffusers and transformers have a quantizer for each; the library itself is a package of its own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from pathlib import Path
from typing import Any

from loraq.config import ModelConfig
from loraq.errors import LoraqError, unknown
from loraq.models.component_names import denoiser_names
from loraq.models.files import components, has_weights, read_json
from loraq.models.source import config_folder

OWN = "loraq"
PACKAGES = {
    "sdnq": ("sdnq", "sdnq"),
    "torchao": ("torchao", "torchao"),
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
    "quanto": ("optimum.quanto", "optimum-quanto"),
    "gguf": ("gguf", "gguf"),
    "modelopt": ("modelopt", "nvidia-modelopt"),
    "auto-round": ("auto_round", "auto-round"),
    "nunchaku_lite": ("kernels", "kernels"),
}
"""`quant_method` → the module that its quantizer imports, and the package to install."""
_ON_GPU = ("bitsandbytes", "nunchaku_lite")
"""Methods that diffusers' quantizer loads for a GPU alone."""
_NOT_LOADED = ("quanto",)
"""Methods whose saved networks diffusers leaves without values in the quantised layers."""


def quantization_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """The `quantization_config` of a network's `config.json`, with its `quant_method`."""
    found = config.get("quantization_config")
    if not isinstance(found, dict):
        return None
    bits = any(found.get(f"load_in_{bits}bit") for bits in (4, 8))  # as older versions wrote it
    return {"quant_method": "bitsandbytes"} | found if bits else found


def check_quantizers(model: ModelConfig, device: str, without: Collection[str] = ()) -> None:
    """LoraqError if a quantised network of the model needs a package or a device that is missing.

    Reads configurations alone. device: "cpu" or "cuda". without: components that are not loaded.
    """
    folder = config_folder(model)
    listed = components(folder)
    for name, (_, class_name) in listed.items():
        path = folder / name / "config.json"
        if name in without or not has_weights(class_name) or not path.is_file():
            continue
        method = (quantization_of(read_json(path)) or {}).get("quant_method")
        if method in PACKAGES:
            check_package(method, f"'{folder / name}' is quantised with {method}")
            if name in denoiser_names(listed):
                _check_loadable(folder / name, method, device)
        elif method not in (None, OWN) and name in denoiser_names(listed):
            raise LoraqError(f"'{path}': {unknown('quant_method', str(method), [OWN, *PACKAGES])}")


def _check_loadable(part: Path, method: str, device: str) -> None:
    if method in _NOT_LOADED:
        problem = "whose saved networks diffusers does not load completely"
    elif method in _ON_GPU and device == "cpu":
        problem = "which diffusers loads on a GPU alone, and this run is on the CPU"
    else:
        return
    raise LoraqError(
        f"'{part}' is quantised with {method}, {problem}. Quantise the pipeline in memory with "
        "that library, and pass it to loraq.score(pipe)."
    )


def check_package(method: str, what: str) -> None:
    """LoraqError unless the library of a method is installed; `what` needs it."""
    module, package = PACKAGES[method]
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # not even the package around it
        found = None
    if found is None:
        raise LoraqError(
            f"{what}, and the library that reads it is not installed. Install it: "
            f"pip install {package}"
        )
