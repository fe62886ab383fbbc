"""The committed notebooks: without outputs, and their code compiles. Jupyter is not needed here."""

from __future__ import annotations

import json
import re

import pytest

from loraq.errors import LoraqError
from notebooks import execute

PATHS = execute.notebooks()


def sources(path, kind: str) -> list[str]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_it_is_committed_without_outputs(path):
    assert execute.is_stripped(path), "python -m notebooks.execute --strip"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_its_code_compiles_and_its_text_names_what_is_there(path):
    for number, source in enumerate(sources(path, "code")):
        compile(source, f"{path.name}, code cell {number}", "exec")
    named = re.findall(
        r"`((?:conf|loraq|notebooks)/[\w./]+\.\w+)`", "\n".join(sources(path, "markdown"))
    )
    assert not [n for n in named if "NAME" not in n and not (execute.FOLDER.parent / n).exists()]


def test_stripping_takes_out_what_a_run_leaves():
    text = PATHS[0].read_text(encoding="utf-8")
    run = json.loads(text)
    code = next(cell for cell in run["cells"] if cell["cell_type"] == "code")
    code |= {"outputs": [{"output_type": "stream", "name": "stdout", "text": "1"}]}
    code |= {"execution_count": 3, "metadata": {"execution": {"shell.execute_reply": "now"}}}
    run["metadata"]["kernelspec"]["display_name"] = "mine"
    assert execute.stripped(json.dumps(run)) == text


def test_an_unknown_notebook_is_answered():
    with pytest.raises(LoraqError, match="1_first_tour"):
        execute.notebooks(["1_first_tuor"])
