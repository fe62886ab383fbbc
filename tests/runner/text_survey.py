"""Which pipelines of the installed diffusers get their text from a recording, by their source.

    python -m tests.runner.text_survey      counts, and the pipelines that do not, with the reason

A recording serves a pipeline whose `__call__` gets everything that text encoders make from methods
with "prompt" in their names, before `prepare_latents`; tokenizers stay loaded. Pipelines that read
a picture as well are counted like the others.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loraq.models.families import MASKED_EMBEDDINGS

_TEXT_PART = re.compile(r"text_encoder(_\d)?")


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
    for kind in ast.parse(text).body:
        if not isinstance(kind, ast.ClassDef):
            continue
        methods = {m.name: m for m in kind.body if isinstance(m, ast.FunctionDef)}
        if {"__call__", "encode_prompt"} <= methods.keys():
            names = ast.unparse(methods["encode_prompt"].body[-1])
            yield Surveyed(
                kind.name,
                any(node.attr == "transformer" for node in _own(methods["__call__"])),
                names == f"return ({', '.join(MASKED_EMBEDDINGS)})",
                _reason(methods),
            )


def _reason(methods: dict[str, ast.FunctionDef]) -> str:
    used = [node.attr for node in _own(methods["__call__"])]
    if "encode_prompt" not in used:
        return "calls no encode_prompt"
    latents = used.index("prepare_latents") if "prepare_latents" in used else len(used)
    if late := [name for name in used[latents:] if name in methods and "prompt" in name]:
        return f"calls {late[0]} after prepare_latents"
    helpers = {name for name in used if name in methods and "prompt" not in name}
    for owner in ("__call__", *sorted(helpers - {"check_inputs"})):
        source = ast.unparse(methods[owner])
        for node in _own(methods[owner]):
            asks = f"self.{node.attr} is not None" in source  # and does without it
            if _TEXT_PART.fullmatch(node.attr) and not asks:
                return f"{owner} reads {node.attr}"
    return ""


@functools.cache
def _own(function: ast.FunctionDef) -> list[ast.Attribute]:
    """The attributes of `self` that a method reads, in order."""
    found = [
        node
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    ]
    return sorted(found, key=lambda node: (node.lineno, node.col_offset))


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
