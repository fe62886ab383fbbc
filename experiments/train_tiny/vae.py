"""Train the autoencoder with L1, LPIPS and a small penalty on the latent, on all named emoji.

Half of a batch are random 64-px crops of the full pictures, half are complete pictures resized to
64 px: the transformer's first phase trains on the latents of the latter. Afterwards the scale of
the latents is folded into the convolutions around them (export.py), so ``scaling_factor`` is
exactly 1.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from . import lpips_weights, model, parallel, runtime, split
from .data import pictures
from .settings import DATA, OUTPUTS, SETTINGS

CHECKPOINT = OUTPUTS / "vae.pt"
CROP = 64
COLOUR_BLOCK = 8
"""Side in pixels of the blocks whose mean colours are compared."""


def batch(images: np.ndarray, size: int, rng: np.random.Generator) -> torch.Tensor:
    """Return a training batch in [-1, 1], [size, 3, 64, 64]: crops and resized pictures."""
    rows = []
    for k, index in enumerate(rng.integers(len(images), size=size)):
        image = torch.from_numpy(np.array(images[index])).permute(2, 0, 1).float()
        if k % 4 < 2:
            # Crops avoid the border: the corners of emoji are white.
            top, left = rng.integers(8, image.shape[1] - CROP - 8 + 1, size=2)
            image = image[:, top : top + CROP, left : left + CROP]
        else:
            image = F.interpolate(image[None], size=(CROP, CROP), mode="area")[0]
        rows.append(image.flip(-1) if rng.random() < 0.5 else image)
    return torch.stack(rows) / 127.5 - 1


def losses(vae: torch.nn.Module, metric: torch.nn.Module, x: torch.Tensor) -> dict:
    """Return L1, LPIPS, the error of the local colours and the penalty on the latent.

    L1 alone prefers the most frequent hue; the square of the colours' errors weighs a wrong one.
    """
    y, penalty = model.networks().reconstruct(vae, x)
    colour = F.avg_pool2d(y - x, COLOUR_BLOCK).square().mean()
    l1, lpips = (y - x).abs().mean(), metric(x, y).mean()
    return {"l1": l1, "lpips": lpips, "colour": colour, "penalty": penalty}


def train(exchange: parallel.Exchange, seconds: float, steps: int, size: int, peak: float) -> None:
    """Train for ``steps`` steps or ``seconds`` of wall time; resumes from the last checkpoint."""
    where = runtime.device()
    _, by_name = split.load()
    images = pictures([i.fluent for i in by_name.values()], DATA / "fluent128.npy")
    metric = lpips_weights.perceptual_distance().to(where)
    vae = model.networks().autoencoder(SETTINGS).to(where, memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=0.01)
    average = {k: v.detach().clone() for k, v in vae.state_dict().items()}
    step, used = 0, 0.0
    if saved := runtime.load_checkpoint(CHECKPOINT, where):
        vae.load_state_dict(saved["vae"])
        optimiser.load_state_dict(saved["optimiser"])
        average, step, used = saved["average"], saved["step"], saved["used"]
    first = exchange.rank == 0
    log = runtime.wandb_run("vae", {"size": size, "peak": peak}, OUTPUTS) if first else None
    bar = tqdm(total=steps, initial=step, desc="vae", mininterval=5, disable=not first)

    def checkpoint() -> None:
        state = {"vae": vae.state_dict(), "optimiser": optimiser.state_dict(), "average": average}
        runtime.save_atomic(state | {"step": step, "used": used}, CHECKPOINT)

    last = time.time()
    while step < steps and used < seconds:
        # The generator depends only on the step, so a resumed run sees the same batches.
        rng = np.random.default_rng((SETTINGS.seed, step))
        torch.manual_seed(step * 64 + exchange.rank)
        rate = runtime.learning_rate(max(step / steps, used / seconds), peak, decay=0.45)
        for group in optimiser.param_groups:
            group["lr"] = rate
        x = exchange.slice(batch(images, size, rng)).to(where, memory_format=torch.channels_last)
        parts = losses(vae, metric, x)
        loss = parts["l1"] + 0.5 * parts["lpips"] + 4 * parts["colour"] + 2e-4 * parts["penalty"]
        optimiser.zero_grad()
        loss.backward()
        stamp = time.time()
        now = exchange.average(vae.parameters(), used + stamp - last)
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        step += 1
        keep = min(0.998, 1 - 10 / (step + 10))
        with torch.no_grad():
            for key, value in vae.state_dict().items():
                average[key].lerp_(value, 1 - keep)
        used, last = now, stamp
        bar.update()
        if first and step % 20 == 0:
            values = {k: float(v.detach()) for k, v in parts.items()} | {"lr": rate}
            log.log(values, step=step)
            bar.set_postfix({k: f"{v:.3g}" for k, v in values.items()})
        if first and step % 200 == 0:
            checkpoint()
            preview(vae, images, OUTPUTS / f"grids/vae_{step:06d}.png")
    if first:
        checkpoint()
        log.finish()


@torch.no_grad()
def preview(vae: torch.nn.Module, images: np.ndarray, path: Path) -> None:
    """Save eight pictures above their reconstructions."""
    margin = min(50, len(images) // 4)
    picks = np.linspace(margin, len(images) - margin, 8).astype(int)
    x = torch.from_numpy(np.stack([images[i] for i in picks])).permute(0, 3, 1, 2) / 127.5 - 1
    x = x.to(next(vae.parameters()).device)
    y = vae.decode(model.networks().encode(vae, x)).sample
    runtime.grid(torch.cat([x, y]), 8, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--steps", type=int, default=SETTINGS.vae_steps)
    parser.add_argument("--size", type=int, default=8)
    parser.add_argument("--peak", type=float, default=SETTINGS.vae_rate)
    arguments = parser.parse_args()
    parallel.launch(
        train,
        sum(p.numel() for p in model.networks().autoencoder(SETTINGS).parameters()),
        (arguments.seconds, arguments.steps, arguments.size, arguments.peak),
    )
