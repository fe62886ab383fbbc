"""LoRA on the packed embedded model, beside the same LoRA on the 16-bit one.

    python -m experiments.bench.adapters [--method loraq_o2] [--prompts 6] [--steps 30]
                                         [--grid FILE.png] [--output FILE.json]

Trains an adapter of rank 4 that paints in blue: on the 16-bit model's images of 8 calibration
captions, in shades of blue. Then both models generate the first test captions without and with it,
from the same seeds. PSNR between packed and 16 bits, without and with the adapter, says whether
the adapter does on packed layers what it does on 16-bit ones; that between images without and with
it, how much it changes. At last the adapter is removed from the packed model.

Expected time: a minute on 2 idle cores. Outcome: docs/adapters.md.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft import (
    LoraConfig,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch import Tensor
from torchvision.transforms.functional import to_tensor

import loraq
from loraq.compose import load_rows
from loraq.config import DataConfig, ModelConfig
from loraq.data import Prompt, data_prompts
from loraq.diffusers_quantizer import packed_layers
from loraq.models import load_pipeline
from loraq.results import record
from loraq.results.plots.grid import image_grid
from loraq.runner.embeddings import encode_prompts
from loraq.runner.generate import image_batch
from loraq.utils import batch_invariance

LORA = LoraConfig(
    r=4,
    lora_alpha=4,
    target_modules=["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"],
)
BLUE = (0.25, 0.5, 1.0)
"""Red, green and blue of the lightest shade."""
BATCH, RATE = 4, 5e-3
EXAMPLES = 8
"""Calibration captions whose images the adapter is trained on."""
SHOWN = 3
"""Prompts of the grid."""


def generate(pipe: Any, model: ModelConfig, prompts: Sequence[Prompt]) -> Tensor:
    """Images (N, 3, H, W) of `prompts` in [0, 1]."""
    text = encode_prompts(pipe, model, prompts)
    images = image_batch(pipe, model, prompts, 0, embeddings=text)
    return torch.stack([to_tensor(image) for image in images])


def train_adapter(pipe: Any, model: ModelConfig, prompts: Sequence[Prompt], steps: int) -> Any:
    """The trained matrices by name, as peft saves them; the pipeline itself is left as it is."""
    images = generate(pipe, model, prompts)
    grey = images.mean(1, keepdim=True)
    blue = grey * torch.tensor(BLUE)[None, :, None, None]
    network = copy.deepcopy(pipe.transformer).requires_grad_(False)
    torch.manual_seed(0)
    inject_adapter_in_model(LORA, network)
    learned = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(learned, RATE)
    with torch.no_grad():
        latents = pipe.vae.encode(2 * blue - 1).latent_dist.mean * pipe.vae.config.scaling_factor
        hidden, mask, *_ = pipe.encode_prompt(
            [prompt.prompt for prompt in prompts],
            do_classifier_free_guidance=False,
            max_sequence_length=model.max_sequence_length,
        )
    for step in range(steps):
        chosen = torch.randperm(len(prompts))[:BATCH]
        noise = torch.randn_like(latents[chosen])
        time = torch.rand(len(chosen))
        flow = network(
            torch.lerp(latents[chosen], noise, time[:, None, None, None]),
            encoder_hidden_states=hidden[chosen],
            encoder_attention_mask=mask[chosen],
            timestep=1000 * time,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0][:, : latents.shape[1]]
        loss = torch.nn.functional.mse_loss(flow, noise - latents[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    return get_peft_model_state_dict(network)


def add_adapter(transformer: Any, state: Any) -> None:
    """Load the trained matrices into a transformer, packed or not."""
    inject_adapter_in_model(LORA, transformer)
    set_peft_model_state_dict(transformer, state)


def psnr(images: Tensor, others: Tensor) -> list[float]:
    """In dB, by image."""
    errors = (images.double() - others.double()).square().flatten(1).mean(1)
    return (-10 * errors.log10()).tolist()


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, generate, print and write the record and the grid."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--method", default="loraq_o2")
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--grid", type=Path, metavar="FILE.png")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    batch_invariance.configure_cpu_math()
    config = load_rows(["model=tiny_pixart", "method=reference"])[0]
    model, pipe = config.model, load_pipeline(config.model, "cpu")
    pipe.set_progress_bar_config(disable=True)
    prompts = data_prompts(config.data)[: options.prompts]
    examples = data_prompts(DataConfig(set="captions", split="calibration"))[:EXAMPLES]
    state = train_adapter(pipe, model, examples, options.steps)

    made = {"16 bits": generate(pipe, model, prompts)}
    plain = copy.deepcopy(pipe.transformer)
    add_adapter(pipe.transformer, state)
    made["16 bits, LoRA"] = generate(pipe, model, prompts)
    pipe.transformer = plain
    quantized = loraq.quantize(pipe, options.method)
    made["packed"] = generate(pipe, model, prompts)
    add_adapter(pipe.transformer, state)
    made["packed, LoRA"] = generate(pipe, model, prompts)
    adapters = packed_layers(pipe).adapters
    recurse_remove_peft_layers(pipe.transformer)
    removed = torch.equal(generate(pipe, model, prompts), made["packed"])

    rows = []
    for one, other in (
        ("packed", "16 bits"),
        ("packed, LoRA", "16 bits, LoRA"),
        ("16 bits, LoRA", "16 bits"),
        ("packed, LoRA", "packed"),
    ):
        values = psnr(made[one], made[other])
        rows.append({"images": one, "reference": other, "psnr": fmean(values), "each": values})
        print(f"{one} against {other}: {fmean(values):.2f} ± {stdev(values):.2f} dB", flush=True)
    print(f"bits as before after removing the adapter: {removed}")
    if options.grid is not None:
        save_grid(made, prompts[:SHOWN], options.grid)
    if options.output is not None:
        settings = {
            **{name: getattr(options, name) for name in ("method", "prompts", "steps")},
            "rank": LORA.r,
            "bits_per_weight": quantized.bits_per_weight,
            "adapter_bytes": sum(adapters.values()),
            "equal_after_removing": removed,
        }
        record.save_findings({"settings": settings, "rows": rows}, options.output)


def save_grid(made: dict[str, Tensor], prompts: Sequence[Prompt], path: Path) -> None:
    """A picture of prompts × ways."""
    from torchvision.utils import save_image

    with tempfile.TemporaryDirectory() as folder:
        columns = []
        for number, images in enumerate(made.values()):
            columns.append([Path(folder) / f"{number}_{row}.png" for row in range(len(prompts))])
            for image, file in zip(images, columns[-1], strict=False):
                save_image(image, file)
        image_grid([*made], columns, [prompt.prompt for prompt in prompts], path)


if __name__ == "__main__":
    main()
