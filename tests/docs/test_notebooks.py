"""The committed notebooks: no outputs, valid code, existing imports; Jupyter is not needed."""

from __future__ import annotations

import ast
import importlib
import json
import re
from importlib.util import find_spec
from types import ModuleType

import pytest

from loraq.errors import LoraqError
from notebooks import execute

PATHS = execute.notebooks()


def sources(path, kind: str) -> list[str]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


def has_name(module: ModuleType, name: str) -> bool:
    """Whether `from module import name` works: an attribute or a submodule."""
    if hasattr(module, name):
        return True
    return hasattr(module, "__path__") and find_spec(f"{module.__name__}.{name}") is not None


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_it_is_committed_without_outputs(path):
    assert execute.is_stripped(path), "python -m notebooks.execute --strip"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_its_code_compiles_imports_exist_and_its_text_names_existing_files(path):
    for number, source in enumerate(sources(path, "code")):
        code = compile(source, f"{path.name}, code cell {number}", "exec", ast.PyCF_ONLY_AST)
        for node in ast.walk(code):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("loraq"):
                module = importlib.import_module(node.module)
                absent = [name.name for name in node.names if not has_name(module, name.name)]
                assert not absent, f"{node.module} has no {absent}"
    named = re.findall(
        r"`((?:conf|loraq|notebooks)/[\w./]+\.\w+)`", "\n".join(sources(path, "markdown"))
    )
    assert not [n for n in named if "NAME" not in n and not (execute.FOLDER.parent / n).exists()]


def test_stripping_removes_outputs_and_metadata():
    text = PATHS[0].read_text(encoding="utf-8")
    run = json.loads(text)
    code = next(cell for cell in run["cells"] if cell["cell_type"] == "code")
    code |= {"outputs": [{"output_type": "stream", "name": "stdout", "text": "1"}]}
    code |= {"execution_count": 3, "metadata": {"execution": {"shell.execute_reply": "now"}}}
    run["metadata"]["kernelspec"]["display_name"] = "mine"
    assert execute.stripped(json.dumps(run)) == text


def test_an_unknown_notebook_raises():
    with pytest.raises(LoraqError, match="1_first_tour"):
        execute.notebooks(["1_first_tuor"])
