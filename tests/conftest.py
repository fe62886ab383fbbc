"""Fixtures: small random pipelines and captions, with which an experiment runs in seconds."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from loraq.utils import batch_invariance
from tests.settings import small_run

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
    """Settings of a run on `tiny_folder` with an output folder of its own."""
    return small_run(tiny_folder, captions, tmp_path / "outputs")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "loraq-test", str(folder)]
    if os.getuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
