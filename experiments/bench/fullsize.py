"""Seconds and peak memory to quantise the shapes of PixArt-Σ and SANA-1.6B, one process a row.

    python -m experiments.bench.make_fullsize pixart_sigma FOLDER    (once)
    python -m experiments.bench.fullsize pixart_sigma FOLDER [--methods rtn lqer …]
                                         [--formats int4 mxfp4_e2m1] [--output FILE.json]

Each row is the command `loraq quantize` on the synthetic snapshot that `make_fullsize` wrote, from
an empty cache, in a process of its own. Read from outside, ten times a second: anonymous memory
(RssAnon; pages of mapped files do not count) above that of a bare `import torch`, and from the
progress bar the estimate of the whole time after the first tenth. Weight errors are of random
weights: they say that rows computed something comparable, nothing about quality. Rows that
FILE.json holds are kept: delete it to measure all of them again.

Expected time: ten minutes a format for PixArt-Σ on 2 cores, several times that for SANA.
Outcome: results/bench/fullsize_*.json, docs/speed.md.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loraq.errors import unknown
from loraq.utils.memory import anonymous_bytes

from .kept import KeptRows

METHODS = ("rtn", "lqer", "loftq", "loraq_o1", "loraq_o2")
FORMATS = {
    "int4": [],
    "mxfp4_e2m1": [
        "format@quant.weight=mxfp4_e2m1",
        "format@quant.activation=mxfp4_e2m1",
        "format@quant.branch_weight=mxfp8_e4m3",
        "format@quant.branch_activation=mxfp8_e4m3",
    ],
}
PACKED = "quantised/*/*.safetensors"
"""The packed files of finished groups below an output folder."""
BRANCH = ("format@quant.branch_weight", "format@quant.branch_activation")
BASELINE = "import sys, torch; print('ready', flush=True); sys.stdin.readline()"
BAR = re.compile(r"quantise: +(\d+)%.*?\[([\d:]+)<([\d:?]+)")


def bare_torch() -> int:
    """RssAnon of a process that has imported torch and nothing else."""
    with subprocess.Popen(
        [sys.executable, "-c", BASELINE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = anonymous_bytes(process.pid)
        process.communicate("\n")
    return found


def seconds_of(clock: str) -> float:
    """`1:02:03` or `02:03` in seconds."""
    total = 0.0
    for part in clock.split(":"):
        total = 60 * total + float(part)
    return total


def settings_of(method: str, main_format: str) -> list[str]:
    """Overrides of a row; formats of a branch only where there is one."""
    chosen = [f"method={method}", *FORMATS[main_format]]
    return [s for s in chosen if method != "rtn" or not s.startswith(BRANCH)]


def quantise_command(model: str, folder: Path, overrides: Sequence[str], output: Path) -> list[str]:
    """`loraq quantize` of the snapshot in `folder`."""
    command = [sys.executable, "-m", "loraq.cli", "quantize", f"model={model}", "model.hub_id=null"]
    return [*command, f"model.path={folder}", f"output={output}", *overrides]


def quantise(
    model: str, folder: Path, overrides: Sequence[str], output: Path, bare: int
) -> dict[str, Any]:
    """Run the command and watch it; its log ends in the error if it fails. bare: `bare_torch`."""
    command = quantise_command(model, folder, overrides, output)
    started, peak = time.perf_counter(), 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        stream, text = process.stdout, bytearray()
        assert stream is not None
        reader = threading.Thread(target=lambda: text.extend(stream.read()), daemon=True)
        reader.start()
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(0.1)
        reader.join()
    wall, log = time.perf_counter() - started, text.decode(errors="replace")
    if process.returncode:
        raise SystemExit(log[-2000:])
    measured = {"wall_seconds": wall, "peak_anonymous_bytes": peak, "bare_torch_bytes": bare}
    measured["peak_above_torch_bytes"] = peak - bare
    return measured | _estimate(log) | _quantised(output)


def _estimate(log: str) -> dict[str, float | None]:
    """Of the bar's own seconds: what it foresaw once a tenth was done, and what it came to."""
    shown = [(int(m[1]), seconds_of(m[2]), m[3]) for m in BAR.finditer(log)]
    known = [row for row in shown if row[0] >= 10 and "?" not in row[2]]
    early = [spent + seconds_of(left) for _, spent, left in known]
    last = shown[-1][1] if shown else None
    return {"estimated_seconds": early[0] if early else None, "bar_seconds": last}


def _quantised(output: Path) -> dict[str, Any]:
    """What the packed layers' own files say: seconds of the groups, mean error, bytes."""
    from loraq.quantization.group_file import load_group

    seconds, losses = [], []
    files = sorted(output.glob(PACKED))
    for path in files:
        _, notes = load_group(path)
        seconds.append(notes["seconds"])
        losses.append(notes["losses"][-1])
    size = sum(path.stat().st_size for path in files)
    error = sum(losses) / len(losses)
    return {"group_seconds": sum(seconds), "mean_weight_error": error, "file_bytes": size}


def _place(row: dict[str, Any]) -> tuple[int, int]:
    """Where a row stands in the table, whenever it was measured."""
    names = (row["format"], FORMATS), (row["method"], METHODS)
    first, last = ([*known].index(name) if name in known else len(known) for name, known in names)
    return first, last


def summary(model: str, row: dict[str, Any]) -> str:
    """One line for a reader who waits."""
    memory = row["peak_above_torch_bytes"] / 2**30
    line = f"{model} {row['format']} {row['method']}: {row['wall_seconds']:.0f} s, "
    line += f"{memory:.2f} GiB above torch"
    if row["estimated_seconds"] is not None:
        line += f"; a tenth foresaw {row['estimated_seconds']:.0f} s of {row['bar_seconds']:.0f}"
    return line


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="pixart_sigma or sana_1_6b")
    parser.add_argument("folder", type=Path, help="what make_fullsize wrote")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="METHOD")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), metavar="FORMAT")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    for name in options.formats:
        if name not in FORMATS:
            raise unknown("format", name, FORMATS)
    bare = bare_torch()
    kept = KeptRows(options.output, options.model, ("format", "method"), _place)
    for chosen in options.formats:
        for method in options.methods:
            if kept.has(chosen, method):
                continue
            settings = settings_of(method, chosen)
            with tempfile.TemporaryDirectory() as output:
                row = quantise(options.model, options.folder, settings, Path(output), bare)
            row |= {"method": method, "format": chosen}
            print(summary(options.model, row), flush=True)
            kept.add(row)


if __name__ == "__main__":
    main()
