"""A hub and NVIDIA's host on this machine, with little networks in the published files' formats.

The little files have other hashes than the published ones, so the table is replaced as well
(`with_table.py`): by one of their own sizes and sha256.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from experiments.parity.clip import write_clip
from experiments.parity.image_reward import pairs
from experiments.parity.twins import golden_scores
from loraq.metrics.common.published import IMAGE_REWARD, INCEPTION, PUBLISHED
from tests.data.hub import Hub, serving

Files = dict[str, dict[str, bytes]]
"""Name of the weights → file name → contents."""


def little_files(folder: Path) -> Files:
    """The files of every entry of the table, under their published names."""
    write_clip(folder)
    write_as_published(folder)
    write_little_image_reward(folder)
    write_little_inception(folder / INCEPTION.files[0].name)
    made = {path.name: path.read_bytes() for path in folder.iterdir()}
    return {w.name: {file.name: made[file.name] for file in w.files} for w in PUBLISHED}


def write_as_published(folder: Path) -> None:
    """Change a CLIP of today's transformers to what the published files of 2022 look like."""
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    images = json.loads((folder / "preprocessor_config.json").read_text())
    side = images["size"]["shortest_edge"]
    for name in ("do_convert_rgb", "do_rescale", "image_processor_type", "rescale_factor"):
        images.pop(name)
    images |= {"feature_extractor_type": "CLIPFeatureExtractor", "crop_size": side, "size": side}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    special = dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>")
    special["bos_token"] = "<|startoftext|>"
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(special | settings))
    (folder / "processor_config.json").unlink(missing_ok=True)
    weights = load_file(folder / "model.safetensors")
    for part in ("text_model", "vision_model"):  # tables that today's classes compute
        length = len(weights[f"{part}.embeddings.position_embedding.weight"])
        weights[f"{part}.embeddings.position_ids"] = torch.arange(length)[None]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def write_little_image_reward(folder: Path) -> None:
    """ImageReward's two files: one block each of width 64, images of 32 px."""
    less = {768: 64, 2304: 192, 3072: 256, 197: 5}
    shapes = {
        name: [less.get(side, side) for side in shape]
        for name, shape in golden_scores("base")["shapes"].items()
        if not re.search(r"(blocks|encoder\.layer)\.[1-9]", name)
    }
    drawn = pairs.weights(shapes, 0)
    state = {name: torch.from_numpy(values) for name, values in drawn.items()}
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(512)[None]
    torch.save(state, folder / IMAGE_REWARD.files[0].name)
    size = {"hidden_size": 64, "intermediate_size": 256, "encoder_width": 64}
    more = {"num_attention_heads": 1, "num_hidden_layers": 1}
    med_config = json.dumps(pairs.MED_CONFIG | size | more)
    (folder / IMAGE_REWARD.files[1].name).write_text(med_config)


class Layers(torch.nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grey = x.mean(1, keepdim=True) * self.scale
        return torch.nn.functional.adaptive_avg_pool2d(grey, (32, 64)).flatten(1)


class Network(torch.nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.layers = Layers(scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def write_little_inception(path: Path, scale: float = 1.0) -> None:
    """TorchScript with the interface of Inception's file: `scale` times 2048 means."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated; FID's weights are in it
        torch.jit.script(Network(scale)).save(str(path))


def table_of(files: Files, address: str) -> dict[str, dict]:
    """For `use_table`: size and sha256 of every file, and the address of NVIDIA's host."""
    listed = {
        name: [(n, len(data), hashlib.sha256(data).hexdigest()) for n, data in contents.items()]
        for name, contents in files.items()
    }
    return {"files": listed, "address": f"{address}/nvidia/"}


@contextlib.contextmanager
def serving_weights(files: Files) -> Iterator[Hub]:
    """All of them on one server, by the addresses of the table."""
    served = {}
    for weights in PUBLISHED:
        place = f"{weights.repository}/resolve/{weights.revision}" if weights.revision else "nvidia"
        served |= {f"{place}/{name}": data for name, data in files[weights.name].items()}
    with serving("", served, "files") as hub:
        yield hub
