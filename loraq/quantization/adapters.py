"""Quantise a transformer into which adapters (LoRA) are loaded.

refuse   an error, with the remedies (`models/plain_layers.py`)
fuse     merged into the 16-bit weights as by peft, which are then quantised
keep     taken off while the layers are quantised, then put around the packed layers
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

from torch import nn

from loraq.errors import LoraqError, unknown
from loraq.layers.linear import QuantizedLinear
from loraq.models.adapters import adapted_layers, put_back, take_off
from loraq.models.denoisers import dtype_of, parts
from loraq.models.finite import require_finite

AdapterChoice = Literal["refuse", "fuse", "keep"]


@contextlib.contextmanager
def without_adapters(denoiser: nn.Module, choice: AdapterChoice) -> Iterator[Callable[[], None]]:
    """Quantise `denoiser` in the block, in which its layers are plain ones, unless refused.

    The block calls what it gets once all is checked: with "fuse", this merges the adapters. After
    an exception they are around their layers again, and merged ones stay so, as by `fuse_lora`.
    Raises LoraqError for an unknown choice, one without effect, and adapters that it cannot be
    applied to.
    """
    if choice not in get_args(AdapterChoice):
        raise unknown("adapters", choice, get_args(AdapterChoice))
    if choice == "refuse":
        yield lambda: None
        return
    _check(denoiser, choice)
    tuners = take_off(denoiser)

    def fuse() -> None:
        for tuner in tuners.values() if choice == "fuse" else ():
            tuner.merge()

    try:
        yield fuse
    except BaseException:
        put_back(denoiser, tuners)
        raise
    if choice == "fuse":
        for network in parts(denoiser).values():
            network.__dict__.pop("peft_config", None)
            network._hf_peft_config_loaded = False
        return
    put_back(denoiser, {name: _around(denoiser, name, t) for name, t in tuners.items()})


def _around(denoiser: nn.Module, name: str, tuner: Any) -> Any:
    """The tuner layer for the layer that is now called `name`, packed or not."""
    if not isinstance(denoiser.get_submodule(name), QuantizedLinear):
        return tuner
    from loraq.quantization.peft_layers import AdaptedLinear  # peft is optional

    return AdaptedLinear.of(tuner, dtype_of(denoiser))


def _check(denoiser: nn.Module, choice: AdapterChoice) -> None:
    tuners = adapted_layers(denoiser)
    if not tuners:
        raise LoraqError(
            f"adapters='{choice}' has no effect: no adapter (LoRA) is loaded into "
            f"{type(denoiser).__name__}. Load it first (pipe.load_lora_weights), or leave it out."
        )
    if hasattr(denoiser, "get_base_model"):
        raise LoraqError(
            f"adapters='{choice}' takes adapters that are loaded into the transformer, and this is "
            "a PeftModel around it. Set pipe.transformer to its .merge_and_unload() to fuse, or to "
            "its .unload() and load the adapter after quantising."
        )
    for name, tuner in tuners.items():
        if reason := _reason(tuner, choice):
            raise LoraqError(f"adapters='{choice}': the adapter of '{name}' {reason}.")
        require_finite({f"{name}.{k}": v for k, v in tuner.named_parameters() if "lora_" in k})


def _reason(tuner: Any, choice: AdapterChoice) -> str | None:
    """Why a tuner layer can be neither fused nor kept, with the remedy; None if it can."""
    from peft.tuners import lora  # optional; here an adapter of peft is loaded

    kind = type(tuner).__name__
    if type(tuner) not in (lora.Linear, lora.Conv2d):
        return f"is a {kind}, not LoRA of peft on a plain layer. Merge it yourself, then unload it"
    idle = tuner.lora_A.keys() - ({} if tuner.disable_adapters else {*tuner.active_adapters})
    if choice == "fuse" and idle:
        return (
            f"'{min(idle)}' is loaded but not active, and would be left out. Activate it "
            "(pipe.set_adapters, pipe.enable_lora), or remove it (pipe.delete_adapters)"
        )
    if choice == "keep" and tuner.merged:
        return "is fused already. Call pipe.unfuse_lora(), or use adapters='fuse'"
    if choice == "keep" and tuner.lora_variant:
        return "scales the weights of its layer (DoRA). Use adapters='fuse'"
    return None
