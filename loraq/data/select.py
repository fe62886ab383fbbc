"""Which prompts a run takes: those it generates, those that methods may read, those it measures."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loraq.config import CalibrationConfig, DataConfig, ModelConfig
from loraq.data.prompt import Prompt
from loraq.data.sets import prompt_set, prompts_of, remedy
from loraq.errors import LoraqError
from loraq.models.source import resolve_folder
from loraq.utils.assets import resolve_asset

LONGEST_RANDOM = 32  # tokens of a random text


def shuffled(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The order from which the SVDQuant reference cuts its subsets: `random.Random(0)`."""
    drawn = list(prompts)
    random.Random(0).shuffle(drawn)
    return drawn


def subset(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """The reference's subset: shuffled, the first `count`, then sorted by name."""
    return sorted(shuffled(prompts)[:count], key=lambda prompt: prompt.name)


def data_prompts(data: DataConfig) -> list[Prompt]:
    """What is generated: all of the set for count=null, the first of a captions file, the
    reference's subset of a published set."""
    prompts = prompts_of(data.set, location(data), data.split, "data")
    if data.count is None:
        return prompts
    if data.count > len(prompts):
        part = f"split '{data.split}' of {data.captions}"
        raise LoraqError(
            f"data.count={data.count} is above the limit: "
            f"{part if data.set == 'captions' else data.captions} has {len(prompts)} prompts. "
            f"Give {len(prompts)} or less."
        )
    return prompts[: data.count] if prompt_set(data.set).first else subset(prompts, data.count)


def location(data: DataConfig) -> Path:
    """The set's file or folder."""
    if data.captions is None:
        missing = remedy(data.set, Path("FOLDER"))
        raise LoraqError(f"data.set={data.set} needs data.captions=FOLDER. {missing}")
    return resolve_asset(data.captions)


def calibration_prompts(
    data: DataConfig, calibration: CalibrationConfig, model: ModelConfig
) -> tuple[list[Prompt], list[Prompt]]:
    """(prompts that methods may read, prompts kept for measuring output errors), disjoint."""
    prompts = _unseen(data, calibration)
    drawn = calibration.text == "random"
    asked = calibration.measure_prompts + (0 if drawn else calibration.prompts)
    if asked > len(prompts):
        read = "" if drawn else f"calibration.prompts={calibration.prompts} and "
        raise LoraqError(
            f"{read}calibration.measure_prompts={calibration.measure_prompts} want {asked} prompts "
            f"that no image is made of; there are {len(prompts)} {_whence(data, calibration)}, and "
            "the two must not overlap. Ask for fewer, or name a list for them: "
            "calibration.captions=FILE (asset:captions.json is at hand)."
        )
    measuring = prompts[-calibration.measure_prompts :]
    if drawn:
        return random_prompts(calibration.prompts, calibration.seed, model), measuring
    return prompts[: calibration.prompts], measuring


def _unseen(data: DataConfig, calibration: CalibrationConfig) -> list[Prompt]:
    """Prompts that no image is made of: a list or split of its own, or what the run leaves."""
    if calibration.captions is not None:
        path, key = resolve_asset(calibration.captions), "calibration"
        prompts = prompts_of(calibration.set, path, calibration.split, key)
        return prompts if prompt_set(calibration.set).first else shuffled(prompts)
    if data.set == "captions":
        return prompts_of("captions", location(data), calibration.split, "calibration")
    chosen = {prompt.name for prompt in data_prompts(data)}
    prompts = prompts_of(data.set, location(data), data.split, "data")
    return [prompt for prompt in shuffled(prompts) if prompt.name not in chosen]


def _whence(data: DataConfig, calibration: CalibrationConfig) -> str:
    if calibration.captions is not None:
        return f"in {calibration.captions}"
    if data.set == "captions":
        return f"in split '{calibration.split}'"
    return f"in {data.captions} beside those that are generated"


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
