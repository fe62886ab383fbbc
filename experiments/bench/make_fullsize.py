"""Write a synthetic snapshot with the shapes of PixArt-Σ or SANA-1.6B to measure time and memory.

    python -m experiments.bench.make_fullsize pixart_sigma|sana_1_6b FOLDER [--seed 0] [--blocks N]

The transformer is written in the hub's layout (config.json, sharded safetensors, index), with the
published configuration, in 16 bits or, with --float32, in float32, as many hub files are; the other
components are small (`placeholders.py`). The weights are random: a low-rank part with a decreasing
spectrum, a heavy-tailed remainder, and outliers in 1 % of the input channels. Errors on them say
nothing about quality.

Expected time: under two minutes on 2 cores. Disk: 1.2 GB and 3.2 GB.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loraq.errors import LoraqError, unknown
from loraq.models.networks import quiet_diffusers

from . import placeholders

CONFIGS: dict[str, dict[str, Any]] = {
    "pixart_sigma": {
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 28,
        "cross_attention_dim": 1152,
        "sample_size": 128,
        "patch_size": 2,
        "caption_channels": 4096,
        "use_additional_conditions": False,
    },
    "sana_1_6b": {
        "in_channels": 32,
        "out_channels": 32,
        "num_attention_heads": 70,
        "attention_head_dim": 32,
        "num_layers": 20,
        "num_cross_attention_heads": 20,
        "cross_attention_head_dim": 112,
        "cross_attention_dim": 2240,
        "caption_channels": 2304,
        "mlp_ratio": 2.5,
        "sample_size": 32,
        "patch_size": 1,
    },
}
"""The published configurations of the transformers; other settings are diffusers' defaults."""

CLASSES = {
    "pixart_sigma": ("PixArtTransformer2DModel", torch.float16),
    "sana_1_6b": ("SanaTransformer2DModel", torch.bfloat16),
}
SHARD_BYTES = 1 << 30
LOW_RANK, OUTLIER_CHANNELS = 64, 0.01
STEM = "diffusion_pytorch_model"


def build_transformer(name: str, blocks: int | None = None) -> nn.Module:
    """The untrained transformer, with the published number of blocks or with `blocks`."""
    if name not in CONFIGS:
        raise unknown("full-size model", name, CONFIGS)
    config = CONFIGS[name] | ({} if blocks is None else {"num_layers": blocks})
    return getattr(quiet_diffusers(), CLASSES[name][0])(**config)


def meta_model(name: str, blocks: int | None = None) -> nn.Module:
    """`build_transformer` on the meta device."""
    with torch.device("meta"):
        return build_transformer(name, blocks)


def synthetic_model(name: str, blocks: int, seed: int = 0) -> nn.Module:
    """`build_transformer` with the snapshot's weights in float32."""
    model = build_transformer(name, blocks)
    for key, tensor in model.state_dict().items():
        tensor.copy_(random_weight(key, tensor.shape, seed))
    return model


def random_weight(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """Float32 values that depend only on the seed, the tensor's name and its shape."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    g = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    if len(shape) < 2 or min(shape[:2]) < 2:
        return 0.1 * torch.randn(*shape, generator=g)
    out, width = shape[0], torch.Size(shape[1:]).numel()
    rank = min(LOW_RANK, out, width)
    spectrum_R = torch.linspace(1, 0.1, rank)
    left_OR = torch.randn(out, rank, generator=g) * spectrum_R
    values = left_OR @ torch.randn(rank, width, generator=g) / rank**0.5
    tails = torch.randn(out, width, generator=g).mul_(0.5).exp_()  # log-normal scales: kurtosis 8
    values += tails.mul_(torch.randn(out, width, generator=g))
    count = max(1, round(OUTLIER_CHANNELS * width))
    values[:, torch.randperm(width, generator=g)[:count]] *= 6
    return values.mul_(0.3 / width**0.5).view(*shape)


def plan_shards(model: nn.Module) -> Iterator[list[tuple[str, torch.Size]]]:
    """Names and shapes of the saved tensors, at most SHARD_BYTES per shard."""
    held: list[tuple[str, torch.Size]] = []
    size = 0
    for name, tensor in model.state_dict().items():
        if held and size + 2 * tensor.numel() > SHARD_BYTES:
            yield held
            held, size = [], 0
        held.append((name, tensor.shape))
        size += 2 * tensor.numel()
    yield held


def write_snapshot(
    name: str, folder: Path, seed: int = 0, blocks: int | None = None, float32: bool = False
) -> int:
    """Write the snapshot and return its number of parameters; LoraqError if `folder` exists."""
    from safetensors.torch import save_file
    from tqdm import tqdm

    if folder.exists():
        raise LoraqError(f"'{folder}' already exists. Choose another folder, or remove it.")
    model = meta_model(name, blocks)
    dtype = CLASSES[name][1]
    dtype = torch.float32 if float32 else dtype
    temporary = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "transformer").mkdir(parents=True)
    model.save_config(temporary / "transformer")
    placeholders.write_components(
        name, CONFIGS[name]["caption_channels"], temporary, CLASSES[name][1], seed
    )
    planned = list(plan_shards(model))
    file_of: dict[str, str] = {}
    total = sum(shape.numel() for shard in planned for _, shape in shard)
    with tqdm(total=total, desc=name, unit=" weights", unit_scale=True) as bar:
        for number, shard in enumerate(planned, 1):
            file = f"{STEM}-{number:05d}-of-{len(planned):05d}.safetensors"
            tensors = {}
            for key, shape in shard:
                tensors[key] = random_weight(key, shape, seed).to(dtype)
                file_of[key] = file
                bar.update(shape.numel())
            save_file(tensors, temporary / "transformer" / file, metadata={"format": "pt"})
    weight_map = {"metadata": {"total_size": total * dtype.itemsize}, "weight_map": file_of}
    (temporary / "transformer" / f"{STEM}.safetensors.index.json").write_text(
        json.dumps(weight_map)
    )
    temporary.rename(folder)
    return total


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help=" or ".join(CONFIGS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--blocks", type=int, help="fewer blocks than the model has")
    parser.add_argument("--float32", action="store_true", help="store 32 bits per weight")
    options = parser.parse_args(arguments)
    total = write_snapshot(
        options.model, options.folder, options.seed, options.blocks, options.float32
    )
    print(f"{options.folder}: {total} random parameters, shapes of {options.model}")


if __name__ == "__main__":
    main()
