"""The pages as HTML: `make docs`. The source folder is the repository: pages link out of docs/.

The order of the pages is that of the links in index.md; nothing else lists them.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project, release = "LoRaQ", PROJECT["version"]
copyright = "the LoRaQ contributors"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "experiments/*.md", "results/*.md"]
include_patterns += ["results/reported/*.md", "loraq/assets/NOTICE.md"]

myst_enable_extensions = ["html_image"]
myst_heading_anchors = 4  # as on GitHub: a heading's words, in small letters, with dashes
highlight_language = "none"  # an indented block is an equation or a drawing
default_role = "code"  # docstrings write `name`
autodoc_typehints = "signature"
python_use_unqualified_type_names = True

html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["tables.css"]
html_title = f"LoRaQ {release}"
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}

LINK = re.compile(r"\]\((?P<path>[^)#:]+)\.md\)")
PARAMETER = re.compile(r"^`?(\w+)`?: (?=\S)")


def index(app: Any, page: str, source: list[str]) -> None:
    """The navigation: the pages that the index links to, in its order."""
    if page == root_doc:
        pages = "\n".join(match["path"] for match in LINK.finditer(source[0]))
        source[0] += f"\n```{{toctree}}\n:hidden:\n\n{pages}\n```\n"


def parameters(app: Any, kind: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """`name: what it is`, with its following lines indented, is a parameter."""
    if kind in ("function", "method", "class"):
        lines[:] = [PARAMETER.sub(r":param \1: ", line) for line in lines]


def setup(app: Any) -> None:
    app.connect("source-read", index)
    app.connect("autodoc-process-docstring", parameters)
