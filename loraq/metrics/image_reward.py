"""ImageReward-v1.0 (Xu et al. 2023): a learned reward of (prompt, image), per image.

Works where the package `image-reward` imports and its files are at hand; both are checked before
anything runs. Nothing is downloaded: the folder named by LORAQ_IMAGE_REWARD holds `ImageReward.pt`
(read as tensors only, never unpickled) and `med_config.json`, and the tokenizer `bert-base-uncased`
lies in the hub's cache. Prompts are cut at 35 tokens, as the model was trained.
"""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path
from typing import Any

from loraq.errors import LoraqError
from loraq.metrics.image_set import ImageSet
from loraq.metrics.result import MetricResult, Options, mean, versions

NAME = "image_reward"
VERSION = "1"
DIRECTION = "higher"
NEEDS = "prompts"
PER_IMAGE = True
VARIABLE = "LORAQ_IMAGE_REWARD"
FILES = ("ImageReward.pt", "med_config.json")
REMEDY = "or use the metric alignment instead (a proxy under its own name)"


def check(options: Options) -> None:
    _folder()
    _package()


def compute(images: ImageSet, options: Options) -> MetricResult:
    import torch

    model = load(options.device)
    assert images.prompts is not None
    with torch.inference_mode():
        pairs = zip(images.prompts, images.paths, strict=True)
        values = [float(model.score(prompt, str(path))) for prompt, path in pairs]
    weights = _folder() / FILES[0]
    with open(weights, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    details = {"packages": versions("image-reward", "transformers"), "weights_sha256": digest}
    return MetricResult(NAME, DIRECTION, mean(values), values, details=details)


@functools.lru_cache(maxsize=1)
def load(device: str) -> Any:
    """The model with every weight of its file used and none missing."""
    import torch

    folder = _folder()
    model = _package().ImageReward(device=device, med_config=str(folder / FILES[1]))
    state = torch.load(folder / FILES[0], map_location="cpu", weights_only=True)
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.endswith("position_ids")]
    if missing:
        raise LoraqError(
            f"{folder / FILES[0]} lacks {len(missing)} weights ({missing[:3]} …; unexpected: "
            f"{unexpected[:3]}): a reward from it would be noise; fetch the file anew"
        )
    return model.to(device).eval()


def _folder() -> Path:
    given = os.environ.get(VARIABLE, "")
    missing = [name for name in FILES if not given or not (Path(given) / name).is_file()]
    if missing:
        raise LoraqError(
            f"metric image_reward needs {' and '.join(missing)} in the folder {VARIABLE}={given!r};"
            f" fetch them from the hub repository zai-org/ImageReward, {REMEDY}"
        )
    return Path(given)


def _package() -> Any:
    try:
        from ImageReward import ImageReward as module
    except Exception as error:  # the package fails in several ways on current transformers
        raise LoraqError(
            f"metric image_reward: `import ImageReward` fails ({type(error).__name__}: {error}); "
            "image-reward 1.5 does not import on current transformers "
            f"(github.com/zai-org/ImageReward/issues/122): use an older environment, {REMEDY}"
        ) from error
    return module
