"""Small random components of the right widths, so that a full-size transformer's pipeline runs.

Tokenizer and scheduler are the embedded model's. The text encoder has one layer with the width of
the transformer's caption embeddings; the autoencoder has the published downsampling factor and
number of latent channels, and eight internal channels beside them. The outputs are not meaningful
images.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loraq.models.networks import quiet_diffusers
from loraq.utils.assets import ASSETS

EMBEDDED = {"pixart_sigma": "tiny_pixart", "sana_1_6b": "tiny_sana"}
COPIED = ("tokenizer", "scheduler")
DC_LATENTS = 32
DC_CHANNELS = (8, 8, 8, 8, 8, DC_LATENTS)  # downsampling by 2^5; latents are repeated into the last


def write_components(
    name: str, caption_channels: int, folder: Path, dtype: torch.dtype, seed: int
) -> None:
    """Write all components of the pipeline except its transformer, and `model_index.json`."""
    source = ASSETS / EMBEDDED[name]
    for part in COPIED:
        shutil.copytree(source / part, folder / part)
    index = json.loads((source / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {"text_encoder": _text_encoder(source, caption_channels), "vae": _autoencoder(name)}
    for part, module in parts.items():
        save: Any = module.to(dtype)
        save.save_pretrained(folder / part)


def _text_encoder(source: Path, width: int) -> nn.Module:
    import transformers

    config = json.loads((source / "text_encoder" / "config.json").read_text())
    if config["model_type"] == "t5":
        config |= {"d_model": width, "num_layers": 1, "num_heads": 1}
        return transformers.T5EncoderModel(transformers.T5Config(**config))
    config |= {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 1}
    config |= {"num_key_value_heads": 1, "max_position_embeddings": 512, "sliding_window": 512}
    config["layer_types"] = config["layer_types"][-1:]
    return transformers.Gemma2Model(transformers.Gemma2Config(**config))


def autoencoder_kl() -> Any:
    """PixArt-Σ's downsampling factor of 8 and four latent channels, eight internal channels."""
    return quiet_diffusers().AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    )


def _autoencoder(name: str) -> nn.Module:
    if name == "pixart_sigma":
        return autoencoder_kl()
    each: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        each[f"{side}_block_types"] = "ResBlock"
        each[f"{side}_block_out_channels"] = DC_CHANNELS
        each[f"{side}_layers_per_block"] = (1,) * len(DC_CHANNELS)
        each[f"{side}_qkv_multiscales"] = ((),) * len(DC_CHANNELS)
    return quiet_diffusers().AutoencoderDC(latent_channels=DC_LATENTS, attention_head_dim=8, **each)
