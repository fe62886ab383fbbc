"""Shared by both trainings: device, dtype, learning-rate schedule, checkpoints and W&B."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import torch

from loraq.utils.files import replacing


def device() -> torch.device:
    """Return the GPU if available, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast_dtype(where: torch.device) -> torch.dtype | None:
    """Return bf16 if its matrix products are faster than fp32's on this machine, else ``None``."""
    if where.type == "cuda":
        return torch.bfloat16
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(64, 384).to(dtype), torch.randn(384, 1536).to(dtype)
        a @ b
        start = time.perf_counter()
        for _ in range(10):
            a @ b
        seconds[dtype] = time.perf_counter() - start
    return torch.bfloat16 if seconds[torch.bfloat16] < 0.7 * seconds[torch.float32] else None


def learning_rate(progress: float, peak: float, warmup: float = 0.03, decay: float = 0.3) -> float:
    """Return the rate at a fraction of the run: linear warm-up, constant, then a cosine to 2 % of
    the peak."""
    if progress < warmup:
        return peak * progress / warmup
    if progress < 1 - decay:
        return peak
    fraction = min(1.0, (progress - 1 + decay) / decay)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * fraction)))


def save_atomic(state: dict, path: Path) -> None:
    """Write a checkpoint to a temporary file and rename it, so that a kill leaves the old one."""
    with replacing(path) as temporary, open(temporary, "wb") as stream:
        torch.save(state, stream)


def load_checkpoint(path: Path, where: torch.device) -> dict | None:
    """Return a checkpoint, or ``None`` if it does not exist yet."""
    if not path.exists():
        return None
    return torch.load(path, map_location=where, weights_only=True)


def wandb_run(name: str, config: dict, folder: Path):
    """Start a W&B run, offline unless ``WANDB_MODE`` is set."""
    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    return wandb.init(project="loraq-train-tiny", name=name, config=config, dir=str(folder))


def grid(images: torch.Tensor, columns: int, path: Path) -> Path:
    """Save images in [-1, 1], [n, 3, h, w], as one PNG grid and return its path."""
    from PIL import Image

    n, c, h, w = images.shape
    rows = math.ceil(n / columns)
    canvas = torch.ones(c, rows * h, columns * w)
    for i, image in enumerate(images.float().cpu().clamp(-1, 1)):
        top, left = i // columns * h, i % columns * w
        canvas[:, top : top + h, left : left + w] = image
    pixels = ((canvas + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    with replacing(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")
    return path
