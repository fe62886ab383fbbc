"""Which pipelines of the installed diffusers get their text from a recording, by their source.

    python -m tests.runner.text_survey      counts, and the pipelines that do not, with the reason

A recording serves a pipeline whose `__call__` gets everything that text encoders make from methods
with "prompt" in their names, before `prepare_latents`; tokenizers stay loaded. Pipelines that read
a picture as well are counted like the others.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loraq.models.families import MASKED_EMBEDDINGS

_TEXT_PART = re.compile(r"text_encoder(_\d)?")
_PROSE = re.compile(r'r?""".*?"""|#[^\n]*', re.DOTALL)


@dataclass(frozen=True)
class Surveyed:
    """A pipeline's class: whether it denoises with a transformer, and why it is not served.

    reason: "" if a recording serves it. named: its `encode_prompt` returns what it has for PixArt.
    """

    name: str
    transformer: bool
    named: bool
    reason: str


@functools.cache
def survey(word: str = "encode_prompt") -> list[Surveyed]:
    """The classes of diffusers with `__call__` and `encode_prompt`, of files that hold `word`."""
    spec = importlib.util.find_spec("diffusers")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "pipelines"
    texts = (path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py")))
    return [found for text in texts if word in text for found in _of_file(text)]


def _of_file(text: str) -> Iterator[Surveyed]:
    """By the text: to parse the 300 files takes many seconds."""
    for body in re.split(r"^(?=class |def |@)", text, flags=re.MULTILINE):
        if not body.startswith("class "):
            continue
        parts = re.split(r"^    def (\w+)", _PROSE.sub("", body), flags=re.MULTILINE)
        methods = dict(zip(parts[1::2], parts[2::2], strict=True))
        if {"__call__", "encode_prompt"} <= methods.keys():
            last = re.sub(r"[\s()]", "", methods["encode_prompt"].rpartition("return")[2])
            yield Surveyed(
                re.split(r"\W+", body)[1],
                "transformer" in _own(methods["__call__"]),
                last.split("@")[0].rstrip(",") == ",".join(MASKED_EMBEDDINGS),
                _reason(methods),
            )


def _reason(methods: dict[str, str]) -> str:
    used = _own(methods["__call__"])
    if "encode_prompt" not in used:
        return "calls no encode_prompt"
    latents = used.index("prepare_latents") if "prepare_latents" in used else len(used)
    if late := [name for name in used[latents:] if name in methods and "prompt" in name]:
        return f"calls {late[0]} after prepare_latents"
    helpers = {name for name in used if name in methods and "prompt" not in name}
    for owner in ("__call__", *sorted(helpers - {"check_inputs"})):
        for name in _own(methods[owner]):
            asks = f"self.{name} is not None" in methods[owner]  # and does without it
            if _TEXT_PART.fullmatch(name) and not asks:
                return f"{owner} reads {name}"
    return ""


def _own(method: str) -> list[str]:
    """The attributes of `self` that a method reads, in order."""
    return re.findall(r"\bself\.(\w+)", method)


def main() -> None:
    """Print the counts and the exceptions."""
    for label, kept in (
        ("all", survey()),
        ("with a transformer", [entry for entry in survey() if entry.transformer]),
    ):
        served, named = sum(not entry.reason for entry in kept), sum(entry.named for entry in kept)
        print(f"{label}: {len(kept)}; recorded {served}; the four names of PixArt {named}")
    for reason, count in Counter(e.reason for e in survey() if e.reason).most_common():
        names = [entry.name for entry in survey() if entry.reason == reason]
        print(f"  {reason} ({count}): {', '.join(names)}")


if __name__ == "__main__":
    main()
