"""Pictures, prompts and weights that both sides of the comparison generate bitwise identically.

Needs only NumPy and PIL, so that it also runs in the package's old environment.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

PAIRS = 24
MED_CONFIG = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 30524,
    "encoder_width": 768,
    "add_cross_attention": True,
}
TEXT = """
red green blue tiny huge cat dog castle sailing ship under stormy sky painting of photograph
cinematic lighting 4k, café naïve Überraschung 東京 don't it's (detailed) well-known #1
watercolour; antidisestablishmentarianism hyperrealistic portrait with sunflowers at dusk
"""


def prompts() -> list[str]:
    """Return prompts of 1 to about 100 words; the last third is longer than 35 tokens."""
    draw = np.random.Generator(np.random.PCG64(7))
    lengths = [1 + number if number < 16 else 30 + 9 * (number - 16) for number in range(PAIRS)]
    return [" ".join(draw.choice(TEXT.split(), size=length)) for length in lengths]


def pictures() -> list[Image.Image]:
    """Return smooth colour fields with edges, of many sizes and both orientations."""
    made = []
    for number in range(PAIRS):
        draw = np.random.Generator(np.random.PCG64(100 + number))
        height, width = (int(side) for side in draw.integers(96, 400, size=2))
        y, x = np.mgrid[0:height, 0:width] / 64.0
        waves = draw.uniform(0.2, 3.0, size=(3, 2))
        phases = draw.uniform(0, 6, size=3)
        planes = [np.sin(a * x + b * y + p) for (a, b), p in zip(waves, phases, strict=True)]
        values = np.stack(planes, -1) * 100 + 127
        values[: height // 3, : width // 2] = draw.integers(0, 256, size=3)
        made.append(Image.fromarray(np.clip(values, 0, 255).round().astype(np.uint8)))
    return made


def weight(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Return a float32 parameter from its name: norms near 1, matrices that preserve scale."""
    draw = np.random.Generator(np.random.PCG64(seed + zlib.crc32(name.encode())))
    values = draw.standard_normal(shape, dtype=np.float32)
    if len(shape) < 2:
        bias = not name.endswith("weight")
        return 0.05 * values + (0.0 if bias else 1.0)
    fan_in = int(np.prod(shape[1:]))
    scale = 0.1 if fan_in == shape[-1] and "embed" in name else 1.2 / fan_in**0.5
    return (scale * values).astype(np.float32)


def weights(shapes: Mapping[str, Iterable[int]], seed: int) -> dict[str, np.ndarray]:
    """Return a model's state from the names and shapes of its parameters, without positions."""
    named = {name: tuple(shape) for name, shape in shapes.items()}
    return {
        name: weight(name, shape, seed)
        for name, shape in named.items()
        if not name.endswith("position_ids")
    }


def write_med_config(path: Path) -> None:
    path.write_text(json.dumps(MED_CONFIG))
