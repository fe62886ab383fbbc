"""Export the averaged weights as a pipeline folder in bf16."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from loraq.utils.files import write_text

from . import model, runtime, split, text, vae
from .settings import OUTPUTS, RECORD, RESULT, SETTINGS


def trained_vae(where: torch.device) -> torch.nn.Module:
    """Return the averaged autoencoder with unit-variance latents."""
    saved = runtime.load_checkpoint(vae.CHECKPOINT, torch.device("cpu"))
    if saved is None:
        raise FileNotFoundError(f"{vae.CHECKPOINT}: train the autoencoder first")
    networks = model.networks()
    autoencoder = networks.autoencoder(SETTINGS)
    autoencoder.load_state_dict(saved["average"])
    statistics = json.loads((OUTPUTS / "latents.json").read_text(encoding="utf-8"))
    mean, std = torch.tensor(statistics["mean"]), torch.tensor(statistics["std"])
    return networks.normalised(autoencoder, mean, std).to(where).eval()


def untrained() -> DiffusionPipeline:
    """Return the pipeline before any training, the lower bound of the evaluation."""
    networks = model.networks()
    return assembled(
        networks.encoder(SETTINGS), networks.autoencoder(SETTINGS), networks.transformer(SETTINGS)
    )


def trained(checkpoint: Path) -> DiffusionPipeline:
    """Return the pipeline with the averaged weights of a training checkpoint."""
    saved = runtime.load_checkpoint(checkpoint, torch.device("cpu"))
    if saved is None:
        raise FileNotFoundError(f"{checkpoint}: train the transformer first")
    networks = model.networks()
    encoder, transformer = networks.encoder(SETTINGS), networks.transformer(SETTINGS)
    encoder.load_state_dict(saved["average"]["text"])
    transformer.load_state_dict(saved["average"]["transformer"])
    return assembled(encoder, trained_vae(torch.device("cpu")), transformer)


def assembled(*networks: torch.nn.Module) -> DiffusionPipeline:
    """Return the pipeline over a text encoder, an autoencoder and a transformer."""
    _, by_name = split.load()
    tokenizer = text.tokenizer([i.caption for i in by_name.values()])
    return model.pipeline(tokenizer, *networks)


def export(pipe: DiffusionPipeline, folder: Path) -> int:
    """Save the pipeline in bf16 with checksums and return the folder's size in bytes.

    The loader verifies `SHA256SUMS` before it loads any file.
    """
    pipe.to(torch.bfloat16).save_pretrained(folder, safe_serialization=True)
    files = sorted(f for f in folder.rglob("*") if f.suffix in (".safetensors", ".json"))
    lines = [
        f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.relative_to(folder).as_posix()}\n"
        for f in files
    ]
    write_text(folder / "SHA256SUMS", "".join(lines))
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def note(pipe: DiffusionPipeline, size: int, checkpoint: Path) -> dict:
    """Return what a model card says of the training: steps, minutes, loss, sizes."""
    here = torch.device("cpu")
    vae_state = runtime.load_checkpoint(vae.CHECKPOINT, here)
    state = runtime.load_checkpoint(checkpoint, here)
    assert vae_state is not None and state is not None  # exported above
    encoders = [n for n, m in pipe.components.items() if n.startswith("text_encoder") and m]
    chosen, by_name = split.load()
    return {
        "pictures": len(by_name),
        "subjects": len(chosen.train),
        "held_out": len(chosen.held_test) + len(chosen.held_dev),
        "vae_steps": vae_state["step"],
        "vae_minutes": round(vae_state["used"] / 60, 1),
        "steps": state["position"][0],
        "minutes": round(state["seconds"] / 60, 1) if "seconds" in state else None,
        "loss": round(state["loss"], 4) if state.get("loss") is not None else None,
        "bytes": size,
        "parameters": {
            part: sum(p.numel() for p in getattr(pipe, part).parameters())
            for part in ("transformer", *encoders, "vae")
        },
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=RESULT / SETTINGS.name)
    parser.add_argument("--checkpoint", type=Path, default=OUTPUTS / "transformer.pt")
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--untrained", action="store_true")
    arguments = parser.parse_args()
    chosen = untrained() if arguments.untrained else trained(arguments.checkpoint)
    size = export(chosen, arguments.folder)
    if not arguments.untrained:
        written = json.dumps(note(chosen, size, arguments.checkpoint), indent=1) + "\n"
        write_text(arguments.record / f"{SETTINGS.name}_training.json", written)
    print(f"{arguments.folder}: {size / 1e6:.1f} MB, {SETTINGS.image_size} px")
