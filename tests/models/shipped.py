"""Every transformer class that diffusers ships, with few layers, as `structure_of` sees it.

python -m tests.models.shipped    prints a table: blocks, layers, roles, what was not traced and why
"""

from __future__ import annotations

import inspect
import re
import sys
import time
from typing import Any

from torch import nn

from loraq.models.discovery.structure import Structure, structure_of_class
from loraq.models.family import Family
from loraq.models.networks import quiet_diffusers

COUNTS = re.compile(r"(num|n)_\w*(layers|blocks)|n?layers|(dit_)?depth")
NEEDED: dict[str, dict[str, Any]] = {
    "DreamLiteTransformer2DModel": {"in_channels": 64, "cross_attention_dim": 64},
    "Transformer2DModel": {
        "in_channels": 64,
        "cross_attention_dim": 64,
        "norm_type": "layer_norm",
    },
    "TransformerTemporalModel": {"in_channels": 64},
    "EasyAnimateTransformer3DModel": {
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": 2,
        "mmdit_layers": 2,
    },
    "CogVideoXTransformer3DModel": {"sample_width": 4, "sample_height": 4, "sample_frames": 1},
    "ConsisIDTransformer3DModel": {"sample_width": 4, "sample_height": 4, "sample_frames": 1},
    "CogView3PlusTransformer2DModel": {"pos_embed_max_size": 8},
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2,
        "in_channels": 16,
        "caption_channels": [4096, 4096],
        "llama_layers": [0, 1, 2, 3],
        "axes_dims_rope": (64, 32, 32),
    },
    "HunyuanDiT2DModel": {"in_channels": 4, "patch_size": 2},
    "LatteTransformer3DModel": {
        "in_channels": 4,
        "patch_size": 2,
        "caption_channels": 64,
        "cross_attention_dim": 1408,
        "norm_type": "ada_norm_single",
    },
    "LuminaNextDiT2DModel": {"num_kv_heads": 8},
    "OmniGenTransformer2DModel": {
        "pos_embed_max_size": 8,
        "rope_scaling": {"short_factor": [1.0] * 48, "long_factor": [1.0] * 48, "type": "su"},
    },
    "PixArtTransformer2DModel": {"caption_channels": 64, "use_additional_conditions": False},
    "WanVACETransformer3DModel": {"vace_layers": [0, 1]},
    "SD3Transformer2DModel": {"dual_attention_layers": (0,)},
}
"""Settings without a usable default."""
NO_DENOISERS = {"DualTransformer2DModel", "MiniMaxMusic3RVQDepthDecoder", "T5FilmDecoder"}
"""Decoders of tokens and a part of a UNet, which the package of transformers holds as well."""


def classes() -> dict[str, Any]:
    """The transformer classes by name."""
    quiet_diffusers()
    from diffusers.models import transformers

    held = {name: getattr(transformers, name) for name in dir(transformers)}
    return {
        name: kind
        for name, kind in held.items()
        if isinstance(kind, type) and issubclass(kind, nn.Module) and name not in NO_DENOISERS
    }


def settings(kind: Any) -> dict[str, Any]:
    """The settings of a class with two blocks of each kind; the others keep their defaults."""
    parameters = inspect.signature(kind.__init__).parameters.values()
    few = {
        p.name: 2
        for p in parameters
        if COUNTS.fullmatch(p.name) and isinstance(p.default, int) and p.default > 2
    }
    return few | NEEDED.get(kind.__name__, {})


def structure(name: str) -> Structure:
    """The structure of a class by rule, without a family."""
    kind = classes()[name]
    return structure_of_class(kind, settings(kind), Family())


def main() -> None:
    """Print a line per class."""
    for name in classes():
        started = time.process_time()
        try:
            found = structure(name)
        except Exception as error:
            print(f"{name:40} FAILS {type(error).__name__}: {str(error)[:150]}", flush=True)
            continue
        seconds = time.process_time() - started
        inside = [layer for layer in found.layers if layer.block]
        roles = dict.fromkeys(f"{layer.role}{'' if not layer.reason else '-'}" for layer in inside)
        blocks = len({layer.block for layer in inside})
        print(
            f"{name:40} {blocks} blocks, {len(inside)} layers, {seconds:.2f} s, "
            f"{found.untraced or found.layout}\n      {' '.join(roles)}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
