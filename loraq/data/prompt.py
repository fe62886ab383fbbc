"""A prompt with its name, and the seed of its image, which depends on the name."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from dataclasses import dataclass

from loraq.errors import LoraqError

_MODULUS = 10**9 + 7


@dataclass(frozen=True)
class Prompt:
    """The prompt of one image; `seen`: whether the model was trained on its subject."""

    name: str
    prompt: str
    seen: bool = True


def seed_of_name(name: str, seed: int = 0) -> int:
    """h = (h·31 + ord(c)) mod (10⁹+7) over the name, from h = `seed` (docs/protocol.md)."""
    value = seed % _MODULUS
    for character in name:
        value = (value * 31 + ord(character)) % _MODULUS
    return value


def check_prompts(prompts: Sequence[Prompt], where: str) -> None:
    """LoraqError for duplicate names, names that are not file names, and blank prompts."""
    counts = collections.Counter(prompt.name for prompt in prompts)
    duplicates = sorted(name for name, count in counts.items() if count > 1)
    invalid = [
        name for name in counts if not name or name.startswith(".") or set(name) & set("/\\\0")
    ]
    if duplicates or invalid:
        raise LoraqError(
            f"{where}: names must be unique and usable as file names; invalid: "
            f"{', '.join((duplicates + invalid)[:5])}. Rename them in the captions file."
        )
    if blank := [prompt.name for prompt in prompts if not prompt.prompt.strip()]:
        raise LoraqError(
            f"{where}: {len(blank)} prompts are blank, the first is '{blank[0]}'. Give every name "
            "a text, or remove its line."
        )
