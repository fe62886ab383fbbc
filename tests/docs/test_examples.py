"""The Python examples of the pages run, on a small model stored in bfloat16 as the embedded are."""

from __future__ import annotations

import re

import pytest
import torch

from loraq.utils.assets import CHECKOUT

SMALL = dict(height=64, width=64, num_inference_steps=1, max_sequence_length=8)
SMALL |= dict(use_resolution_binning=False, clean_caption=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tests.little import little_pixart

    path = tmp_path_factory.mktemp("example") / "model"
    little_pixart().to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("page", "blocks"), [("README.md", 1), ("docs/checkpoints.md", 1), ("docs/engines.md", 2)]
)
def test_an_example_makes_images(page, blocks, folder, tmp_path, monkeypatch):
    text = (CHECKOUT / page).read_text("utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[:blocks])
    for shown, little in {
        "loraq/assets/tiny_pixart": folder.as_posix(),
        "height=128, width=128, num_inference_steps=16": ", ".join(
            f"{name}={SMALL[name]}" for name in ("height", "width", "num_inference_steps")
        ),
        "budget=0.32": "budget=1",  # a scale weighs more in a small layer
    }.items():
        code = code.replace(shown, little)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    assert names["pipe"]("a red cat", **SMALL).images[0].size == (64, 64)
