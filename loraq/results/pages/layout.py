"""The layout of the package as generated parts of the documentation: drawings and module lists.

The order of the packages comes from the contract in pyproject.toml that `lint-imports` checks; the
words come from the modules' own docstrings. Nothing is imported but this module.
"""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

from loraq.errors import unknown

WAYS = {
    "weight": (
        "models/mapped",
        "models/layers",
        "quantization/grouping",
        "quantization/quantizer",
        "quantization/solve",
        "quantization/assemble",
        "quantization/group_file",
        "quantization/model",
        "layers/linear",
        "layers/backends",
        "layers/equation",
        "runner/generate",
    ),
    "prompt": (
        "config/composition",
        "compose",
        "data/select",
        "runner/product_keys",
        "runner/embeddings",
        "runner/generate",
        "metrics/common/image_set",
        "metrics/psnr",
        "metrics/common/summary",
        "results/record",
        "results/tables/tables",
        "results/tables/text",
    ),
}
"""The modules that one weight passes from its safetensors file to an image, and one prompt from
YAML to a cell of a table, in order. `tests/test_ways.py` runs both and checks the order."""
WIDTH = 100


def drawing_block(name: str, root: Path) -> str:
    """`packages`: the packages of `loraq/`, from the command down to the errors, as a drawing."""
    if name != "packages":
        raise unknown("drawing", name, ["packages"])
    contracts = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    levels = contracts["tool"]["importlinter"]["contracts"][0]["layers"]
    rule = "+" + "-" * (WIDTH + 2) + "+"
    lines = [rule]
    for level in levels:
        for place, module in enumerate(level.split("|")):
            short = module.strip().removeprefix("loraq.")
            text = f"{short:20} {_first_words(root, short, WIDTH - 21)}"
            lines += [*([] if not place else ["|" + " ." * (WIDTH // 2 + 1) + "|"])]
            lines.append(f"| {text:{WIDTH}} |")
        lines.append(rule)
    return "\n".join(["```text", *lines, "```"])


def way_block(name: str, root: Path) -> str:
    """`weight` or `prompt`: the modules of `WAYS`, numbered, each with what it is."""
    if name not in WAYS:
        raise unknown("way", name, WAYS)
    return "\n".join(
        f"{number}. `{module}.py`: {_first_sentence(root, module)}"
        for number, module in enumerate(WAYS[name], 1)
    )


def _first_sentence(root: Path, module: str) -> str:
    """The first sentence of a module's or package's docstring."""
    path = root / "loraq" / f"{module}.py"
    if not path.is_file():
        path = root / "loraq" / module / "__init__.py"
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def _first_words(root: Path, module: str, width: int) -> str:
    """As much of the first sentence as fits into `width`, cut at a word."""
    words, text = _first_sentence(root, module.replace(".", "/")).split(), ""
    for word in words:
        if len(f"{text} {word}") > width - 1:
            return f"{text.rstrip(',:;')}…"
        text = f"{text} {word}".strip()
    return text
