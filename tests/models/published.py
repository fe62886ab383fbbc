"""The file lists of published repositories, filled with a little pipeline's weights.

PIXART is the list of PixArt-Sigma-XL-2-1024-MS, SANA that of the repositories of SANA 1.6B at
1024 px (bf16 or fp16 beside float32, and an int4 file that no pipeline reads). Other lists are what
`save_pretrained` and `hf upload` write.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

TEXT, NETWORK = "text_encoder/model", "transformer/diffusion_pytorch_model"
VAE = "vae/diffusion_pytorch_model"


def shards(stem: str, count: int, variant: str = "") -> list[str]:
    """The names of a sharded file and of its index."""
    infix = f".{variant}" if variant else ""
    numbers = range(1, count + 1)
    names = [f"{stem}{infix}-{n:05d}-of-{count:05d}.safetensors" for n in numbers]
    return [*names, f"{stem}.safetensors.index{infix}.json"]


PIXART = (
    *shards(TEXT, 2),
    f"{NETWORK}.safetensors",
    f"{VAE}.safetensors",
)


def sana(variant: str) -> list[str]:
    """The weights of SANA's repositories, whose transformers are sharded in float32 alone."""
    return [
        *shards(TEXT, 2),
        *shards(TEXT, 2, variant),
        *shards(NETWORK, 2),
        f"{NETWORK}.{variant}.safetensors",
        f"{NETWORK}.int4.safetensors",
        f"{VAE}.{variant}.safetensors",
        f"{VAE}.safetensors",
    ]


def variant_only(variant: str) -> list[str]:
    """Sharded text encoder and transformer, in one variant."""
    names = [*shards(TEXT, 2, variant), *shards(NETWORK, 3, variant)]
    return [*names, f"{VAE}.{variant}.safetensors"]


PICKLED = ("text_encoder/pytorch_model.bin", f"{NETWORK}.bin", f"{VAE}.bin")


def published(folder: Path, weights: Sequence[str]) -> dict[str, bytes]:
    """The files of the saved pipeline in `folder`, its weights under these names.

    Values of a variant's files are twice those of the others.
    """
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".safetensors"
    }
    files |= {"README.md": b"# a model\n", "asset/4K_image.jpg": b"\xff\xd8" * 4000}
    saved = {path.parent.name: load_file(path) for path in folder.rglob("*.safetensors")}
    for name in weights:
        tensors = saved[name.partition("/")[0]]
        if variant := re.search(r"\.(bf16|fp16|int4)", name):
            double = {key: 2 * tensor for key, tensor in tensors.items()}
            dtype = torch.float16 if variant[1] == "fp16" else torch.bfloat16
            tensors = {key: tensor.to(dtype) for key, tensor in double.items()}
        files[name] = content(name, tensors, [n for n in weights if same_set(n, name)])
    return files


def content(name: str, tensors: dict[str, Tensor], of_set: Sequence[str]) -> bytes:
    """The bytes of one file of a set: all tensors, a shard of them, or their index."""
    if name.endswith(".bin"):
        stream = io.BytesIO()
        torch.save(tensors, stream)
        return stream.getvalue()
    parts = [n for n in of_set if n.endswith(".safetensors")]
    place = {key: parts[number % len(parts)] for number, key in enumerate(sorted(tensors))}
    if name.endswith(".json"):
        weight_map = {key: Path(part).name for key, part in place.items()}
        return json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    own = {key: tensors[key].clone() for key, part in place.items() if part == name}
    return save(own, {"format": "pt"})


def same_set(one: str, other: str) -> bool:
    """Whether two names are shards, or shard and index, of one set."""

    def key(name: str) -> tuple[str, str | None, bool]:
        variant = re.search(r"\.(bf16|fp16|int4)", name)
        sharded = "-of-" in name or name.endswith(".json")
        return name.partition("/")[0], variant and variant[1], sharded

    return key(one) == key(other)
