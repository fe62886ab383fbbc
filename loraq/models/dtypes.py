"""In which dtype each network of a pipeline runs: in that of the denoiser, or in a wider one.

`model.dtype` is the denoiser's. The other networks run in it too, but for those that are known to
make NaN or other images in it:

    decoders         with float16, one whose configuration says `force_upcast`, and AutoencoderDC:
                     float32. Wan's, as its model card says: float32
    text encoders    with float16, language models, which were trained in bfloat16 (Gemma, Qwen,
                     Mistral, Llama): bfloat16. CLIP was trained in float16, and transformers
                     itself keeps those layers of T5 in float32 that exceed float16.

`model.dtypes={vae: float32}` replaces this rule for a component, `DTYPES` for a family.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraq.config import ModelConfig
from loraq.errors import LoraqError, unknown
from loraq.models.component_names import denoiser_names, is_text
from loraq.models.family import find_family
from loraq.models.files import components, has_weights, read_json
from loraq.models.source import config_folder

if TYPE_CHECKING:
    import torch

_FLOAT16_ENCODERS = ("CLIP", "T5", "UMT5")
_FLOAT32_DECODERS = ("AutoencoderKLWan",)
_FLOAT32_FOR_FLOAT16 = ("AutoencoderDC",)


def network_dtypes(model: ModelConfig) -> dict[str, str]:
    """Component → its dtype, for the model's networks that do not run in `model.dtype`.

    LoraqError if `model.dtypes` names another component than these.
    """
    folder = config_folder(model)
    networks = {name: kind for name, (_, kind) in components(folder).items() if has_weights(kind)}
    denoisers = denoiser_names(networks)
    for name, dtype in model.dtypes.items():
        if name in denoisers:
            raise LoraqError(f"model.dtypes.{name}={dtype}: set model.dtype, the denoiser's.")
        if name not in networks:
            others = [known for known in networks if known not in denoisers]
            raise LoraqError(f"model.dtypes: {unknown('network', name, others)}")
    given = find_family(model.family).DTYPES
    rule = {
        name: dtype
        for name, class_name in networks.items()
        if name not in denoisers and (dtype := _rule(folder / name, class_name, model.dtype))
    }
    chosen = {**(rule if given is None else given), **model.dtypes}
    return {name: chosen[name] for name in networks if chosen.get(name, model.dtype) != model.dtype}


def _rule(part: Path, class_name: str, dtype: str) -> str | None:
    """The dtype of a network beside a denoiser of this dtype, if it is another one."""
    if dtype == "float32":
        return None
    if class_name.startswith(_FLOAT32_DECODERS):
        return "float32"
    if dtype == "bfloat16":
        return None
    upcast = read_json(part / "config.json").get("force_upcast", class_name == "AutoencoderKL")
    if upcast or class_name.startswith(_FLOAT32_FOR_FLOAT16):
        return "float32"
    if is_text(part.name) and not class_name.startswith(_FLOAT16_ENCODERS):
        return "bfloat16"
    return None


def cast_inputs(network: Any) -> None:
    """Floating-point inputs of the network's parts are cast to their dtype.

    Not every pipeline does so with the latents for its decoder.
    """

    def cast(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        dtype = next(module.parameters()).dtype
        return tuple(_cast(x, dtype) for x in args), {n: _cast(x, dtype) for n, x in kwargs.items()}

    for part in network.children():
        if next(part.parameters(), None) is not None:
            part.register_forward_pre_hook(cast, with_kwargs=True)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    floating = getattr(value, "is_floating_point", None)
    return value.to(dtype) if floating is not None and floating() else value


def text_casts(model: ModelConfig) -> dict[torch.dtype, torch.dtype]:
    """Dtypes of embeddings → that of the denoiser, for text encoders that run in another."""
    import torch

    own, chosen = getattr(torch, model.dtype), network_dtypes(model)
    texts = (dtype for name, dtype in chosen.items() if is_text(name))
    return {getattr(torch, dtype): own for dtype in texts}
