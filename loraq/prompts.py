"""Prompts: what is generated, under which name, and the seed that follows from the name."""

from __future__ import annotations

import collections
import functools
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraq.config import CalibrationConfig, DataConfig, ModelConfig
from loraq.errors import LoraqError, unknown
from loraq.models.loading import resolve_asset, resolve_folder

_MODULUS = 10**9 + 7
LONGEST_RANDOM = 32  # tokens of a random text


@dataclass(frozen=True)
class Prompt:
    """One image to make; `seen` tells whether the model was trained on its subject."""

    name: str
    prompt: str
    seen: bool = True


def seed_of_name(name: str, seed: int = 0) -> int:
    """h = (h·31 + ord(c)) mod (10⁹+7) over the name, starting from the run's seed (protocol.md)."""
    value = seed % _MODULUS
    for character in name:
        value = (value * 31 + ord(character)) % _MODULUS
    return value


@functools.lru_cache(maxsize=8)
def _read(path: Path) -> dict[str, list[Prompt]]:
    if not path.is_file():
        raise LoraqError(f"data.captions: there is no file '{path}'. Give a captions JSON file.")
    try:
        splits = json.loads(path.read_text())
        return {
            split: [Prompt(str(e["name"]), str(e["prompt"]), bool(e.get("seen", True))) for e in es]
            for split, es in splits.items()
            if isinstance(es, list)
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise LoraqError(
            f"data.captions: '{path}' is no captions file ({type(error).__name__}: {error}). "
            'It holds {"SPLIT": [{"name": …, "prompt": …, "seen": true|false}, …], …}.'
        ) from None


def _split(captions: str, split: str, key: str) -> list[Prompt]:
    splits = _read(resolve_asset(captions))
    if split not in splits:
        raise LoraqError(f"{key}: {unknown('split', split, splits)}")
    prompts = splits[split]
    counts = collections.Counter(prompt.name for prompt in prompts)
    twice = sorted(name for name, count in counts.items() if count > 1)
    odd = [name for name in counts if not name or name.startswith(".") or set(name) & set("/\\\0")]
    if twice or odd:
        raise LoraqError(
            f"{key}={split}: names must be unique and usable as file names; these are not: "
            f"{', '.join((twice + odd)[:5])}. Rename them in the captions file."
        )
    return prompts


def data_prompts(data: DataConfig) -> list[Prompt]:
    """The first `count` prompts of the split (all of them for None)."""
    prompts = _split(data.captions, data.split, "data.split")
    count = len(prompts) if data.count is None else data.count
    if count > len(prompts):
        raise LoraqError(
            f"data.count={count} is above the limit: split '{data.split}' of {data.captions} has "
            f"{len(prompts)} prompts. Give {len(prompts)} or less."
        )
    return prompts[:count]


def calibration_prompts(
    data: DataConfig, calibration: CalibrationConfig, model: ModelConfig
) -> tuple[list[Prompt], list[Prompt]]:
    """(prompts that methods may read, prompts kept for measuring output errors), disjoint."""
    prompts = _split(data.captions, calibration.split, "calibration.split")
    drawn = calibration.text == "random"
    asked = calibration.measure_prompts + (0 if drawn else calibration.prompts)
    if asked > len(prompts):
        raise LoraqError(
            f"calibration.prompts={calibration.prompts} and calibration.measure_prompts="
            f"{calibration.measure_prompts} are {asked} together; split '{calibration.split}' has "
            f"{len(prompts)}, and the two must not overlap. Ask for fewer."
        )
    measuring = prompts[-calibration.measure_prompts :]
    if drawn:
        return random_prompts(calibration.prompts, calibration.seed, model), measuring
    return prompts[: calibration.prompts], measuring


def random_prompts(count: int, seed: int, model: ModelConfig) -> list[Prompt]:
    """Text that no one wrote: random tokens of the model's own tokenizer, of random length."""
    tokenizer = _tokenizer(resolve_folder(model) / "tokenizer")
    special = set(tokenizer.all_special_ids)
    ids = [i for i in range(len(tokenizer)) if i not in special]
    longest = max(1, min(LONGEST_RANDOM, model.max_sequence_length) - 2)  # begin, end
    found = []
    for number in range(count):
        draw = random.Random(f"{seed}/{number}")
        chosen = [draw.choice(ids) for _ in range(draw.randint(1, longest))]
        found.append(Prompt(f"random_{number}", tokenizer.decode(chosen)))
    return found


@functools.lru_cache(maxsize=8)
def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise LoraqError(
            f"calibration.text=random draws from the model's tokenizer, and '{folder}' does not "
            f"load ({str(error).strip()[:200]}). Restore it, or use calibration.text=captions."
        ) from error
