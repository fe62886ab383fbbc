"""Score the exported model on the test captions, compared with real images and an untrained model.

``fd_efflite0`` is the Fréchet distance to the real images of the same captions (with 256 images its
covariance is rank-deficient, so compare only at the same N). ``alignment`` is the proxy's mean
cosine with the image's caption, ``other`` with the other captions; ``matched`` is how often the
image's caption scores above another one. A user's own pictures get the Fréchet distance alone: the
alignment proxy learned emoji.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from tqdm import tqdm

from loraq.data import seed_of_name
from loraq.metrics.frechet import frechet_distance
from loraq.metrics.networks import alignment_model
from loraq.utils.files import write_text

from . import export, features, model, runtime
from .settings import CAPTIONS, OUTPUTS, OWN, RECORD, RESULT, SETTINGS


def generate(
    pipe: DiffusionPipeline, entries: list[dict], steps: int, guidance: float
) -> torch.Tensor:
    """Return images uint8 [n, 3, h, w] of caption entries, seeded by name."""
    rows = []
    for start in tqdm(range(0, len(entries), 16), desc="images", mininterval=10):
        part = entries[start : start + 16]
        seeds = [seed_of_name(e["name"]) for e in part]
        images = model.sample(pipe, [e["prompt"] for e in part], seeds, steps, guidance)
        rows.append(((images.float().clamp(-1, 1) + 1) * 127.5).round().byte())
    return torch.cat(rows)


@torch.no_grad()
def scores(values: torch.Tensor, real: torch.Tensor, entries: list[dict], head) -> dict[str, float]:
    """Return the metrics of the features [n, 1280] of images generated for the entries."""
    distance = {"fd_efflite0": frechet_distance(values.numpy(), real.numpy())}
    if head is None:
        return distance
    cosine = head.image_features(values) @ head.text_features([e["prompt"] for e in entries]).T
    own = cosine.diagonal()
    other = cosine[~torch.eye(len(cosine), dtype=torch.bool)].view(len(cosine), -1)
    seen = torch.tensor([e["seen"] for e in entries])
    return distance | {
        "alignment": float(own.mean()),
        "alignment_seen": float(own[seen].mean()),
        "alignment_held": float(own[~seen].mean()),
        "other": float(other.mean()),
        "matched_seen": float((own[:, None] > other).float().mean(1)[seen].mean()),
        "matched_held": float((own[:, None] > other).float().mean(1)[~seen].mean()),
    }


def main(
    folder: Path, count: int, steps: int, guidance: float, record: Path, grid: Path
) -> dict[str, dict[str, float]]:
    """Generate, score, print and store the three rows; save a grid of the first 64 images."""
    entries = json.loads(CAPTIONS.read_text(encoding="utf-8"))["test"][:count]
    real = load_file(RESULT / "real_features.safetensors")["features"][:count]
    head = alignment_model.load_alignment_model() if OWN is None else None
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    images = generate(pipe, entries, steps, guidance)
    runtime.grid(images[:64].float() / 127.5 - 1, 8, grid)
    blank = generate(export.untrained(), entries, 2, 1.0)
    table = {
        "real images": scores(real, real, entries, head),
        "this model": scores(features.features(images), real, entries, head),
        "untrained": scores(features.features(blank), real, entries, head),
    }
    kept = {"captions": len(entries), "steps": steps, "guidance": guidance, "rows": table}
    write_text(record / f"{SETTINGS.name}_scores.json", json.dumps(kept, indent=1) + "\n")
    print(f"{len(entries)} captions, {steps} steps, guidance {guidance}")
    for name, row in table.items():
        print(f"{name:12s}", "  ".join(f"{k} {v:.3f}" for k, v in row.items()))
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=RESULT / SETTINGS.name)
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--steps", type=int, default=SETTINGS.inference_steps)
    parser.add_argument("--guidance", type=float, default=SETTINGS.guidance)
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--grid", type=Path, default=OUTPUTS / "grids/evaluate.png")
    a = parser.parse_args()
    main(a.folder, a.count, a.steps, a.guidance, a.record, a.grid)
