"""Assemble the averaged weights into a bf16 ``PixArtSigmaPipeline`` folder."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PixArtSigmaPipeline

from . import model, runtime, split, text, vae
from .settings import ASSETS, OUTPUTS, SETTINGS


def normalised(autoencoder: AutoencoderKL, mean: torch.Tensor, std: torch.Tensor) -> AutoencoderKL:
    """Fold ``z -> (z - mean) / std`` per channel into the two 1 x 1 convolutions around the latent.

    Exact in real numbers: the convolution before the latent loses the affine map, the one after it
    gains the inverse, and the log-variances shift by ``-2 log std``.
    """
    c = len(mean)
    with torch.no_grad():
        before, after = autoencoder.quant_conv, autoencoder.post_quant_conv
        before.weight[:c] /= std[:, None, None, None]
        before.bias[:c] = (before.bias[:c] - mean) / std
        before.bias[c:] -= 2 * std.log()
        after.bias += (after.weight[:, :, 0, 0] * mean).sum(1)
        after.weight *= std[None, :, None, None]
    return autoencoder


def trained_vae(where: torch.device) -> AutoencoderKL:
    """Return the averaged autoencoder with unit-variance latents."""
    saved = runtime.load_checkpoint(vae.CHECKPOINT, torch.device("cpu"))
    if saved is None:
        raise FileNotFoundError(f"{vae.CHECKPOINT}: train the autoencoder first")
    autoencoder = vae.build()
    autoencoder.load_state_dict(saved["average"])
    statistics = json.loads((OUTPUTS / "latents.json").read_text(encoding="utf-8"))
    mean, std = torch.tensor(statistics["mean"]), torch.tensor(statistics["std"])
    return normalised(autoencoder, mean, std).to(where).eval()


def untrained() -> PixArtSigmaPipeline:
    """Return the whole pipeline as it is before any training, the lower bound of the evaluation."""
    _, by_name = split.load()
    tokenizer = text.tokenizer([i.caption for i in by_name.values()])
    return model.pipeline(tokenizer, text.encoder(), vae.build(), model.transformer())


def trained(checkpoint: Path) -> PixArtSigmaPipeline:
    """Return the pipeline with the averaged weights of a training checkpoint."""
    pipe = untrained()
    saved = runtime.load_checkpoint(checkpoint, torch.device("cpu"))
    if saved is None:
        raise FileNotFoundError(f"{checkpoint}: train the transformer first")
    pipe.text_encoder.load_state_dict(saved["average"]["text"])
    pipe.transformer.load_state_dict(saved["average"]["transformer"])
    pipe.vae = trained_vae(torch.device("cpu"))
    return pipe


def export(pipe: PixArtSigmaPipeline, folder: Path) -> int:
    """Save the pipeline in bf16 with checksums and return the folder's size in bytes.

    `SHA256SUMS` lets the loader tell a damaged file from a sound one before anything runs.
    """
    pipe.to(torch.bfloat16).save_pretrained(folder, safe_serialization=True)
    files = sorted(f for f in folder.rglob("*") if f.suffix in (".safetensors", ".json"))
    lines = [
        f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.relative_to(folder).as_posix()}\n"
        for f in files
    ]
    (folder / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=ASSETS / "tiny_pixart")
    parser.add_argument("--checkpoint", type=Path, default=OUTPUTS / "transformer.pt")
    parser.add_argument("--untrained", action="store_true")
    arguments = parser.parse_args()
    chosen = untrained() if arguments.untrained else trained(arguments.checkpoint)
    size = export(chosen, arguments.folder)
    print(f"{arguments.folder}: {size / 1e6:.1f} MB, {SETTINGS.image_size} px")
