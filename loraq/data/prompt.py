"""A prompt with its name, and the seed of its image, which depends on the name."""

from __future__ import annotations

import collections
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from loraq.errors import LoraqError

_MODULUS = 10**9 + 7
_LONGEST_NAME = 200  # bytes: file systems allow 255, and temporary files add to the name


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
    """LoraqError for names that cannot name one file each, and for prompts without text.

    Names that differ only in case, or in how an accent is encoded, are one file on some systems.
    """
    counts = collections.Counter(_file_system_name(prompt.name) for prompt in prompts)
    for prompt in prompts:
        if reason := _unusable(prompt.name):
            raise LoraqError(
                f"{where}: names must be usable as file names, and {prompt.name!r} is not: "
                f"{reason}. Rename it in the file of prompts."
            )
    duplicates = [prompt.name for prompt in prompts if counts[_file_system_name(prompt.name)] > 1]
    if duplicates:
        raise LoraqError(
            f"{where}: names must be unique and usable as file names, on systems that ignore case "
            f"too; these are not: {', '.join(duplicates[:5])}. Rename them in the file of prompts."
        )
    if blank := [prompt.name for prompt in prompts if not prompt.prompt.strip()]:
        raise LoraqError(
            f"{where}: {len(blank)} prompts are blank, the first is '{blank[0]}'. Give every name "
            "a text, or remove its line."
        )
    for prompt in prompts:
        if not _is_text(prompt.prompt):
            raise LoraqError(
                f"{where}: the prompt of '{prompt.name}' contains NUL or half of a surrogate pair "
                f"({prompt.prompt[:60]!a}), which is not text. Remove it."
            )


def _unusable(name: str) -> str | None:
    """Why a name cannot be that of an image, NAME.png; None if it can."""
    if not name:
        return "it is empty"
    if not _is_text(name) or any(unicodedata.category(c) == "Cc" for c in name):
        return "it contains a control character"
    if name.startswith(".") or set(name) & set("/\\"):
        return "it starts with a dot, or contains a slash"
    if len(name.encode()) > _LONGEST_NAME:
        return f"it has {len(name.encode())} bytes, at most {_LONGEST_NAME} are allowed"
    return None


def _is_text(text: str) -> bool:
    """Whether UTF-8 can hold the text, and a C string too."""
    return not any(c == "\0" or "\ud800" <= c <= "\udfff" for c in text)


def _file_system_name(name: str) -> str:
    """What names of the same file have in common where case is ignored."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
