"""Train the alignment proxy's head: images and names of Fluent 3D and Noto emoji, contrastively.

The names of the test and development captions, seen or held out, are not trained on. At the end the
script prints, for the Fluent images of the held-out test names, recall@1 and how often the matching
caption scores above a random other one.
"""

from __future__ import annotations

import json

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from loraq.metrics.networks.alignment_model import HEAD, AlignmentModel, TextEncoder
from loraq.utils.files import replacing

from . import data, features, runtime, split
from .settings import ASSETS, SETTINGS, TRAINING

CACHE = TRAINING / "alignment_features.pt"


def collect() -> dict:
    """Return features, MiniLM embeddings and name indices of training pairs and of held-out
    pairs."""
    if CACHE.exists():
        return torch.load(CACHE, weights_only=True)
    _, by_name = split.load()
    lists = json.loads((ASSETS / "captions.json").read_text(encoding="utf-8"))
    kept_out = {e["name"] for k in ("test", "development") for e in lists[k]}
    held = [e["name"] for e in lists["test"] if not e["seen"]]
    trained = [n for n in by_name if n not in kept_out]
    files = [(n, by_name[n].fluent) for n in trained]
    files += [(n, by_name[n].noto) for n in trained if by_name[n].noto]
    held_files = [(n, by_name[n].fluent) for n in held]
    encode = TextEncoder()
    out: dict = {}
    for key, pairs, names in (("train", files, trained), ("held", held_files, held)):
        images = np.stack([data.picture(path) for _, path in pairs])
        index = {n: i for i, n in enumerate(names)}
        out[key] = {
            "image": features.features(images),
            "text": encode([by_name[n].caption for n in names]),
            "plain": encode([by_name[n].caption.split(",")[0] for n in names]),
            "name": torch.tensor([index[n] for n, _ in pairs]),
        }
    runtime.save_atomic(out, CACHE)
    return out


def train(steps: int = 1500, size: int = 512) -> dict[str, float]:
    """Train the head, save it and return its metrics on held-out pairs."""
    torch.manual_seed(SETTINGS.seed)
    pairs = collect()
    image, name = pairs["train"]["image"], pairs["train"]["name"]
    texts = torch.stack([pairs["train"]["text"], pairs["train"]["plain"]])
    model = AlignmentModel()
    model.mean.copy_(image.mean(0))
    model.std.copy_(image.std(0) + 1e-2)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.3)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = runtime.learning_rate(step / steps, 1e-3)
        picks = torch.randperm(len(image))[:size]
        # Dropout on the features prevents overfitting to the 3,000 pairs.
        a = model.image_features(F.dropout(image[picks], 0.3))
        kind = torch.randint(2, (len(picks),))
        words = texts[kind, name[picks]]
        b = model.project_text(F.dropout(words, 0.1))
        logits = a @ b.T / model.log_temperature.exp()
        # The Noto twin of a name in the batch is a positive too.
        same = (name[picks][:, None] == name[picks][None]).float()
        target = same / same.sum(1, keepdim=True)
        loss = F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()
    figures = evaluate(model, pairs["held"])
    metadata = {k: f"{v:.3f}" for k, v in figures.items()}
    tensors = {k: v.contiguous() for k, v in model.state_dict().items()}
    with replacing(HEAD) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    return figures


@torch.no_grad()
def evaluate(model: AlignmentModel, held: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return recall@1, matched-above-mismatched accuracy and mean cosines over held-out pairs."""
    cosine = model.image_features(held["image"]) @ model.project_text(held["text"]).T
    n = len(cosine)
    matched = cosine.diagonal()
    other = cosine[~torch.eye(n, dtype=torch.bool)].view(n, n - 1)
    return {
        "recall@1": float((cosine.argmax(1) == torch.arange(n)).float().mean()),
        "accuracy": float((matched[:, None] > other).float().mean()),
        "matched": float(matched.mean()),
        "mismatched": float(other.mean()),
        "held_out": n,
    }


if __name__ == "__main__":
    print(json.dumps(train(), indent=1))
