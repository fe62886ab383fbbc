"""The prompts of a run: for generation, for calibration and for measuring output errors."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loraq.config import CalibrationConfig, DataConfig, ModelConfig
from loraq.data.prompt import Prompt
from loraq.data.sets import find_prompt_set, how_to_get, read_prompt_set
from loraq.errors import LoraqError
from loraq.models.files import components, read_json
from loraq.models.source import resolve_folder
from loraq.utils.assets import resolve_asset

LONGEST_RANDOM = 32  # tokens of a random prompt


def shuffled(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts in the SVDQuant reference's random order, `random.Random(0)`."""
    order = list(prompts)
    random.Random(0).shuffle(order)
    return order


def subset(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """The SVDQuant reference's subset: the first `count` of `shuffled`, sorted by name."""
    return sorted(shuffled(prompts)[:count], key=lambda prompt: prompt.name)


def data_prompts(data: DataConfig) -> list[Prompt]:
    """The prompts to generate: all of the set for count=null, the first of a captions file, the
    SVDQuant reference's subset of a published set."""
    prompts = read_prompt_set(data.set, prompts_path(data), data.split, "data")
    if data.count is None:
        return prompts
    if data.count > len(prompts):
        part = f"split '{data.split}' of {data.captions}"
        raise LoraqError(
            f"data.count={data.count} is above the limit: "
            f"{part if data.set == 'captions' else data.captions} has {len(prompts)} prompts. "
            f"Give {len(prompts)} or less."
        )
    return prompts[: data.count] if find_prompt_set(data.set).first else subset(prompts, data.count)


def prompts_path(data: DataConfig) -> Path:
    """The file or folder of the prompt set; LoraqError if `data.captions` is not set."""
    if data.captions is None:
        hint = how_to_get(data.set, Path("FOLDER"))
        raise LoraqError(f"data.set={data.set} needs data.captions=FOLDER. {hint}")
    return resolve_asset(data.captions)


def calibration_prompts(
    data: DataConfig, calibration: CalibrationConfig, model: ModelConfig
) -> tuple[list[Prompt], list[Prompt]]:
    """Disjoint (prompts for calibration, prompts for measuring output errors)."""
    prompts = _unseen(data, calibration)
    from_tokenizer = calibration.text == "random"
    needed = calibration.measure_prompts + (0 if from_tokenizer else calibration.prompts)
    if needed > len(prompts):
        read = "" if from_tokenizer else f"calibration.prompts={calibration.prompts} and "
        raise LoraqError(
            f"{read}calibration.measure_prompts={calibration.measure_prompts} need {needed} "
            f"prompts that the run does not generate; there are {len(prompts)} "
            f"{_source(data, calibration)}, and the two must not overlap. Set lower numbers, or "
            "another list of prompts: calibration.captions=FILE (such as asset:captions.json)."
        )
    measuring = prompts[-calibration.measure_prompts :]
    if from_tokenizer:
        return random_prompts(calibration.prompts, calibration.seed, model), measuring
    return prompts[: calibration.prompts], measuring


def _unseen(data: DataConfig, calibration: CalibrationConfig) -> list[Prompt]:
    """Prompts that the run does not generate: a separate list or split, or the rest of the set."""
    if calibration.captions is not None:
        path, key = resolve_asset(calibration.captions), "calibration"
        prompts = read_prompt_set(calibration.set, path, calibration.split, key)
        return prompts if find_prompt_set(calibration.set).first else shuffled(prompts)
    if calibration.set != "captions":
        raise LoraqError(
            f"calibration.set={calibration.set} needs calibration.captions=FOLDER. "
            f"{how_to_get(calibration.set, Path('FOLDER'))}"
        )
    if data.set == "captions":
        return read_prompt_set("captions", prompts_path(data), calibration.split, "calibration")
    chosen = {prompt.name for prompt in data_prompts(data)}
    prompts = read_prompt_set(data.set, prompts_path(data), data.split, "data")
    return [prompt for prompt in shuffled(prompts) if prompt.name not in chosen]


def _source(data: DataConfig, calibration: CalibrationConfig) -> str:
    if calibration.captions is not None:
        return f"in {calibration.captions}"
    if data.set == "captions":
        return f"in split '{calibration.split}'"
    return f"in {data.captions} in addition to the generated ones"


def random_prompts(count: int, seed: int, model: ModelConfig) -> list[Prompt]:
    """Prompts of random tokens of the model's tokenizer, with random lengths.

    Of several tokenizers, that of the widest text encoder: the others read the same text.
    """
    tokenizer = _tokenizer(tokenizer_folder(resolve_folder(model)))
    special = set(tokenizer.all_special_ids)
    ids = [i for i in range(len(tokenizer)) if i not in special]
    limit = model.max_sequence_length or LONGEST_RANDOM
    longest = max(1, min(LONGEST_RANDOM, limit) - 2)  # BOS, EOS
    found = []
    for number in range(count):
        draw = random.Random(f"{seed}/{number}")
        chosen = [draw.choice(ids) for _ in range(draw.randint(1, longest))]
        found.append(Prompt(f"random_{number}", tokenizer.decode(chosen)))
    return found


def tokenizer_folder(folder: Path) -> Path:
    """The folder of the tokenizer that belongs to the widest text encoder."""
    parts = sorted(name for name in components(folder) if re.fullmatch(r"tokenizer(_\d+)?", name))
    if not parts:
        raise LoraqError(
            f"calibration.text=random uses the model's tokenizer, and '{folder}/model_index.json' "
            "lists none. Use calibration.text=captions."
        )
    widths = {}
    for name in parts:
        file = folder / name.replace("tokenizer", "text_encoder") / "config.json"
        config = read_json(file) if file.is_file() else {}
        config = {**config, **config.get("text_config", {})}
        widths[name] = config.get("d_model", config.get("hidden_size", 0))
    return folder / max(parts, key=lambda name: widths[name])


@functools.lru_cache(maxsize=8)
def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise LoraqError(
            f"calibration.text=random uses the model's tokenizer, and '{folder}' does not "
            f"load ({str(error).strip()[:200]}). Restore it, or use calibration.text=captions."
        ) from error
