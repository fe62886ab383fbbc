"""Train text encoder and transformer jointly by flow matching, first at 64 px, then at 128 px.

x_t = (1 - t) x_0 + t noise with logit-normal t; the network predicts noise - x_0 from (x_t, 1000
t, caption). A tenth of the captions are empty, for classifier-free guidance. The first phase uses
pictures of half the size (16 tokens, a quarter of the cost). PixArt's position embeddings cover the
same range in both phases; SANA has none.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

from . import export, latents, model, parallel, runtime, split, text
from .settings import OUTPUTS, OWN, SETTINGS, Settings

CHECKPOINT = OUTPUTS / "transformer.pt"
# The average is updated only every few steps, to limit its memory traffic on a CPU.
AVERAGE_EVERY = 4
PREVIEW = (
    "red apple, food fruit",
    "dog face, animal mammal",
    "red heart, heart",
    "grinning face, face smiling",
    "automobile, transport ground",
    "hamburger, food prepared",
    "tropical fish, animal marine",
    "alarm clock, time",
)


@dataclass(frozen=True)
class Phase:
    """One resolution: latent side, steps, batch size, and a time limit in minutes."""

    side: int
    steps: int
    size: int
    minutes: float = 1e9


class Pair(torch.nn.Module):
    """Text encoder and transformer as one module, predicting the flow of a noised latent."""

    def __init__(self, settings: Settings = SETTINGS):
        """Build both networks untrained."""
        super().__init__()
        self.networks = model.networks(settings)
        self.text = self.networks.encoder(settings)
        self.transformer = self.networks.transformer(settings)

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Return the predicted flow of latents [n, c, s, s] at times t [n] in (0, 1)."""
        conditions = self.networks.conditions(self.text, ids, mask)
        return self.networks.flow(self.transformer, x, t, *conditions)


def parameter_groups(pair: Pair, decay: float) -> list[dict]:
    """Return AdamW groups: matrices decay; biases, norms, tables and embeddings do not."""
    matrices, rest = [], []
    for name, parameter in pair.named_parameters():
        special = ("table", "shared", "relative", "embed_tokens", "_embedding", "conv_depth")
        plain = parameter.ndim < 2 or any(word in name for word in special)
        (rest if plain else matrices).append(parameter)
    return [{"params": matrices, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]


def batches(step: int, count: int, size: int, shape: tuple[int, ...], dropout: float) -> tuple:
    """Return indices, times, noise and dropped captions, which depend only on the step."""
    generator = torch.Generator().manual_seed(SETTINGS.seed * 1_000_003 + step)
    # Each epoch is a fresh permutation, so every subject is seen equally often.
    first, picks = step * size, []
    while len(picks) < size:
        epoch, offset = divmod(first + len(picks), count)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(epoch)).tolist()
        picks += order[offset : offset + size - len(picks)]
    t = torch.randn(size, generator=generator).sigmoid()
    noise = torch.randn((size, *shape), generator=generator)
    dropped = torch.rand(size, generator=generator) < dropout
    return torch.tensor(picks), t, noise, dropped


def average_decay(step: int) -> float:
    """Return the decay of one update of the weight average: 0.5 for the first updates, then
    0.98."""
    return 0.5 if step < 60 else 0.98


def train(exchange: parallel.Exchange, phases: list[Phase], peak: float, decay: float) -> None:
    """Run the phases one after another, resuming after a kill from the last checkpoint."""
    where = runtime.device()
    number = runtime.autocast_dtype(where)
    chosen, by_name = split.load()
    tokenizer = text.tokenizer([i.caption for i in by_name.values()])
    names = [by_name[n].caption for n in chosen.train]
    ids, mask = text.tokens(tokenizer, names, SETTINGS.text_length)
    empty_ids, empty_mask = text.tokens(tokenizer, [""], SETTINGS.text_length)
    data = latents.encode()
    pair = Pair().to(where)
    average = {k: v.detach().clone() for k, v in pair.state_dict().items()}
    optimiser = torch.optim.AdamW(
        parameter_groups(pair, decay), lr=peak, betas=(0.9, 0.98), fused=True
    )
    step, phase_index, phase_step, used = 0, 0, 0, 0.0
    recent, seconds, begun = None, 0.0, time.time()
    if saved := runtime.load_checkpoint(CHECKPOINT, where):
        pair.text.load_state_dict(saved["text"])
        pair.transformer.load_state_dict(saved["transformer"])
        average = {f"{p}.{k}": v for p, s in saved["average"].items() for k, v in s.items()}
        optimiser.load_state_dict(saved["optimiser"])
        step, phase_index, phase_step, used = saved["position"]
        recent, seconds = saved.get("loss"), saved.get("seconds", 0.0)
    first = exchange.rank == 0
    config = {"phases": str(phases), "peak": peak, "decay": decay}
    log = runtime.wandb_run("transformer", config, OUTPUTS) if first else None

    def divided(state: dict) -> dict:
        return {
            part: {k.removeprefix(part + "."): v for k, v in state.items() if k.startswith(part)}
            for part in ("text", "transformer")
        }

    def checkpoint() -> None:
        state = divided(pair.state_dict()) | {"average": divided(average)}
        position = (step, phase_index, phase_step, used)
        state |= {"optimiser": optimiser.state_dict(), "position": position}
        state |= {"loss": recent, "seconds": seconds + time.time() - begun}
        runtime.save_atomic(state, CHECKPOINT)

    def preview() -> None:
        held = pair.state_dict()
        held = {k: v.clone() for k, v in held.items()}
        pair.load_state_dict(average)
        autoencoder = export.trained_vae(where)
        pipe = model.pipeline(tokenizer, pair.text, autoencoder, pair.transformer)
        prompts = list(PREVIEW if OWN is None else ()) + names[:: max(1, len(names) // 5)][:8]
        pixels = SETTINGS.stride * phases[min(phase_index, len(phases) - 1)].side
        images = model.sample(pipe, prompts, [7] * len(prompts), pixels=pixels)
        runtime.grid(images, 8, OUTPUTS / f"grids/step_{step:06d}.png")
        pair.load_state_dict(held)

    total = sum(p.steps for p in phases)
    bar = tqdm(total=total, initial=step, desc="transformer", mininterval=10, disable=not first)
    last_preview = time.time()
    while phase_index < len(phases):
        phase = phases[phase_index]
        final = phase_index == len(phases) - 1
        z = data[str(phase.side)]
        last = time.time()
        while phase_step < phase.steps and used < phase.minutes * 60:
            progress = max(phase_step / phase.steps, used / (phase.minutes * 60))
            # Only the last phase decays; every phase warms up because the resolution changes.
            rate = (
                runtime.learning_rate(progress, peak)
                if final
                else (peak * min(1.0, (phase_step + 1) / 100))
            )
            for group in optimiser.param_groups:
                group["lr"] = rate
            picks, t, noise, dropped = batches(
                step, len(z), phase.size, tuple(z.shape[1:]), SETTINGS.caption_dropout
            )
            x0 = z[picks]
            x = torch.lerp(x0, noise, t.view(-1, 1, 1, 1))
            words = torch.where(dropped[:, None], empty_ids, ids[picks])
            seen = torch.where(dropped[:, None], empty_mask, mask[picks])
            moved = [exchange.slice(v).to(where) for v in (x, t, words, seen, noise - x0)]
            with torch.autocast(where.type, number, enabled=number is not None):
                flow = pair(*moved[:4])
            loss = F.mse_loss(flow.float(), moved[4])
            optimiser.zero_grad()
            loss.backward()
            stamp = time.time()
            now = exchange.average(pair.parameters(), used + stamp - last)
            norm = torch.nn.utils.clip_grad_norm_(pair.parameters(), 1.0)
            optimiser.step()
            step, phase_step = step + 1, phase_step + 1
            if step % AVERAGE_EVERY == 0:
                with torch.no_grad():
                    state = pair.state_dict()
                    torch._foreach_lerp_(
                        [average[k] for k in state], list(state.values()), 1 - average_decay(step)
                    )
            used, last = now, stamp
            recent = loss.item() if recent is None else 0.98 * recent + 0.02 * loss.item()
            bar.update()
            if first and step % 20 == 0:
                log.log(
                    {"loss": recent, "lr": rate, "norm": float(norm), "side": phase.side}, step=step
                )
                bar.set_postfix(loss=f"{recent:.4f}", lr=f"{rate:.1e}", side=phase.side)
            if first and step % 200 == 0:
                checkpoint()
                if time.time() - last_preview > 420:
                    preview()
                    last_preview = time.time()
                last = time.time()
        phase_index, phase_step, used = phase_index + 1, 0, 0.0
        if first:
            checkpoint()
            preview()
    if first:
        log.finish()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, nargs=2, default=(2400, 3800), metavar=("LOW", "HIGH"))
    parser.add_argument("--sizes", type=int, nargs=2, default=(32, 16), metavar=("LOW", "HIGH"))
    parser.add_argument("--minutes", type=float, nargs=2, default=(1e9, 1e9))
    parser.add_argument("--peak", type=float, default=1e-3)
    parser.add_argument("--decay", type=float, default=0.1)
    a = parser.parse_args()
    low, high = (
        Phase(side, steps, size, minutes)
        for side, steps, size, minutes in zip(
            SETTINGS.sides, a.steps, a.sizes, a.minutes, strict=True
        )
    )
    latents.encode()
    parallel.launch(
        train, sum(p.numel() for p in Pair().parameters()), ([low, high], a.peak, a.decay)
    )
