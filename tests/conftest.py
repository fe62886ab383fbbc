"""Fixtures: small random pipelines and captions, with which an experiment runs in seconds."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from loraq.utils import batch_invariance

if TYPE_CHECKING:
    from tests.embedded import Embedded

# Without a GPU, kernels run in Triton's interpreter. Triton reads this variable when it is first
# imported, which packages of other tests do.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
batch_invariance.configure_cpu_math()  # before the first matrix product


@pytest.fixture(scope="session")
def embedded() -> Embedded:
    """The embedded model with inputs captured in a short 16-bit run."""
    from tests.embedded import run_embedded

    return run_embedded()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved PixArtSigmaPipeline of random weights: width 64, two blocks, 64 px."""
    from tests.little import little_pixart

    folder = tmp_path_factory.mktemp("model") / "tiny"
    little_pixart().save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def sana_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved SanaPipeline of random weights: width 40, two blocks, 64 px."""
    from tests.little import little_sana

    folder = tmp_path_factory.mktemp("model") / "sana"
    little_sana().save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A captions file with three splits."""

    def split(name: str, count: int) -> list[dict]:
        colours, animals = ["red", "green", "blue"], ["cat", "dog", "fish"]
        return [
            {
                "name": f"{name}_{i}",
                "prompt": f"a {colours[i % 3]} {animals[i // 3 % 3]}",
                "seen": i % 2 == 0,
            }
            for i in range(count)
        ]

    path = tmp_path_factory.mktemp("captions") / "captions.json"
    splits = {"calibration": split("c", 8), "development": split("d", 4), "test": split("t", 8)}
    path.write_text(json.dumps(splits))
    return path


@pytest.fixture
def overrides(tiny_folder: Path, captions: Path, tmp_path: Path) -> list[str]:
    """Settings with which a row on the small pipeline runs in one or two seconds."""
    return [
        f"model.path={tiny_folder}",
        "model.height=64",
        "model.width=64",
        "model.steps=2",
        "model.max_sequence_length=8",
        f"data.captions={captions}",
        "data.count=4",
        "data.real=null",
        "metrics.names=[psnr]",
        "metrics.bootstrap=100",
        "generate.batch_size=2",
        "calibration.prompts=2",
        "calibration.measure_prompts=2",
        "calibration.rows_per_layer=64",
        "tracking=disabled",
        "device=cpu",
        f"output={tmp_path / 'outputs'}",
    ]
