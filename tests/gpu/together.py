"""Two processes, one per GPU, divide the images of one run: the same images as from one process."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from tests.gpu.setting import Item, Row, Setting
from tests.little import little_pixart
from tests.settings import small_run


def items(setting: Setting) -> Iterator[Item]:
    """One run by one process and by two; on a machine with one GPU, both on it."""
    call = functools.partial(two_processes, setting)
    yield Item("two processes make the images of one run", call)


def two_processes(setting: Setting) -> Row:
    """A small model's images by one process and by two at once have the same bytes."""
    cards, count = (1, 2) if setting.dry else (torch.cuda.device_count(), 8)
    with tempfile.TemporaryDirectory() as place:
        model, captions = Path(place) / "model", Path(place) / "captions.json"
        little_pixart().save_pretrained(model)
        rows = [{"name": f"p{n}", "prompt": f"a red cat {n}", "seen": False} for n in range(8)]
        parts = ("calibration", "development", "test")
        captions.write_text(json.dumps(dict.fromkeys(parts, rows)))
        found = []
        for processes in (1, 2):
            output = Path(place) / f"by_{processes}"
            settings = small_run(model, captions, output)
            settings += [
                f"device={setting.device.type}",
                f"data.count={count}",
                "generate.batch_size=1",
            ]
            _generate(settings, processes, cards)
            found.append(_images(output))
    holds = bool(found[0]) and found[0] == found[1]
    return {"gpus": min(2, cards), "images": len(found[0]), "holds": holds}


def _generate(settings: list[str], processes: int, cards: int) -> None:
    """Run `loraq generate` in so many processes at once; RuntimeError if one fails."""
    command = [sys.executable, "-m", "loraq", "generate", "method=rtn", *settings, "--quiet"]
    started = []
    for number in range(processes):
        environment = os.environ | {"LOCAL_RANK": str(number % cards)}
        started.append(
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
            )
        )
    try:
        for process in started:
            text, _ = process.communicate(timeout=240)
            if process.returncode:
                raise RuntimeError(text.decode(errors="replace").strip()[-500:])
    finally:
        for process in started:
            process.kill()  # after a failure, those that still run
            process.wait()


def _images(output: Path) -> dict[str, str]:
    """Folder of a product and name → sha256, of all images."""
    found = sorted((output / "images").glob("*/*.png"))
    return {f"{p.parent.name}/{p.name}": hashlib.sha256(p.read_bytes()).hexdigest() for p in found}
