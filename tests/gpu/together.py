"""Two processes, one per GPU, divide the images of one run: the same images as from one process."""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from tests.gpu.setting import Item, Row, Setting


def items(setting: Setting) -> Iterator[Item]:
    """One run by one process and by two; on a machine with one GPU, both on it."""
    call = functools.partial(two_processes, setting)
    yield Item("two processes make the images of one run", call)


def two_processes(setting: Setting) -> Row:
    """The embedded model's images by one process and by two at once have the same bytes."""
    cards = 1 if setting.dry else torch.cuda.device_count()
    with tempfile.TemporaryDirectory() as place:
        alone, shared = Path(place) / "alone", Path(place) / "shared"
        _run(setting, alone, 1, cards)
        _run(setting, shared, 2, cards)
        one, two = _images(alone), _images(shared)
    return {"gpus": min(2, cards), "images": len(one), "holds": bool(one) and one == two}


def _run(setting: Setting, output: Path, processes: int, cards: int) -> None:
    """Run `loraq generate` in so many processes at once; RuntimeError if one fails."""
    command = [sys.executable, "-m", "loraq", "generate", "method=rtn", "model=tiny_pixart"]
    count, steps = (2, 1) if setting.dry else (32, 16)
    command += [f"data.count={count}", "generate.batch_size=1", f"model.steps={steps}", "--quiet"]
    command += [f"device={setting.device.type}", f"output={output}", "tracking=disabled"]
    started = []
    for number in range(processes):
        environment = os.environ | {"LOCAL_RANK": str(number % cards)}
        started.append(
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
            )
        )
    for process in started:
        text, _ = process.communicate(timeout=240)
        if process.returncode:
            raise RuntimeError(text.decode(errors="replace").strip()[-500:])


def _images(output: Path) -> dict[str, str]:
    """Folder of a product and name → sha256, of all images."""
    found = sorted((output / "images").glob("*/*.png"))
    return {f"{p.parent.name}/{p.name}": hashlib.sha256(p.read_bytes()).hexdigest() for p in found}
