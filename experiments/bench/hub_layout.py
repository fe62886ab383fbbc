"""The published repositories of PixArt-Σ and SANA-1.6B without their weights, to plan with them.

Configurations are the published ones; the files of weights are sparse: they have the size and the
number of parameters, and no contents.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .make_fullsize import CLASSES, STEM, meta_model

PIPELINES = {"pixart_sigma": "PixArtSigmaPipeline", "sana_1_6b": "SanaPipeline"}
PARTS: dict[str, dict[str, tuple[str, str]]] = {
    "pixart_sigma": {
        "transformer": ("diffusers", "PixArtTransformer2DModel"),
        "vae": ("diffusers", "AutoencoderKL"),
        "text_encoder": ("transformers", "T5EncoderModel"),
    },
    "sana_1_6b": {
        "transformer": ("diffusers", "SanaTransformer2DModel"),
        "vae": ("diffusers", "AutoencoderDC"),
        "text_encoder": ("transformers", "Gemma2Model"),
    },
}
VAES: dict[str, dict[str, Any]] = {
    "pixart_sigma": {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
    },
    "sana_1_6b": {
        "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
        "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
        "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
        "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
        "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
        "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
        "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
        "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
        "upsample_block_type": "interpolate",
        "downsample_block_type": "conv",
        "latent_channels": 32,
        "attention_head_dim": 32,
    },
}
TEXT_PARAMETERS = {"pixart_sigma": 4_762_310_656, "sana_1_6b": 2_614_341_888}
"""Parameters of T5-XXL's encoder and of Gemma 2 2B."""


def write_layout(name: str, folder: Path) -> None:
    """Write the repository's files into a new `folder`; takes a second and some kilobytes."""
    parts = PARTS[name]
    index = {"_class_name": PIPELINES[name], **{part: list(pair) for part, pair in parts.items()}}
    (folder / "vae").mkdir(parents=True)
    (folder / "text_encoder").mkdir()
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "vae" / "config.json").write_text(
        json.dumps({"_class_name": parts["vae"][1], **VAES[name]})
    )
    meta_model(name).save_config(folder / "transformer")
    half = "F16" if CLASSES[name][1].itemsize == 2 else "F32"
    weights = {"all": sum(p.numel() for p in meta_model(name).parameters())}
    _write_sparse(folder / "transformer" / f"{STEM}.safetensors", weights, half)
    text = {"all": TEXT_PARAMETERS[name]}
    _write_sparse(folder / "text_encoder" / "model.safetensors", text, half)


def _write_sparse(path: Path, sizes: Mapping[str, int], dtype: str) -> None:
    """A safetensors file with a true header and a hole in place of the values."""
    size = {"F16": 2, "F32": 4}[dtype]
    header, end = {}, 0
    for name, count in sizes.items():
        header[name] = {
            "dtype": dtype,
            "shape": [count],
            "data_offsets": [end, end := end + size * count],
        }
    text = json.dumps(header).encode()
    text += b" " * (8 * math.ceil(len(text) / 8) - len(text))
    with path.open("xb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
