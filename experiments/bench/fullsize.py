"""Seconds and peak memory to quantise the shapes of PixArt-Σ and SANA-1.6B, one process per row.

    python -m experiments.bench.make_fullsize pixart_sigma FOLDER    (once)
    python -m experiments.bench.fullsize pixart_sigma FOLDER [--methods rtn lqer …]
                                         [--formats int4 mxfp4_e2m1] [--output FILE.json]

Each row runs the command `loraq quantize` on the synthetic snapshot of `make_fullsize`, with an
empty cache, in a separate process. Samples its anonymous memory ten times a second (RssAnon,
without mapped files) and subtracts that of `import torch`; reads the estimated total time after the
first tenth from the progress bar. Weight errors are of random weights: they show that rows are
comparable and say nothing about quality. Rows in FILE.json are not measured again; delete it to
repeat them.

Expected time: ten minutes per format for PixArt-Σ on 2 cores, several times that for SANA.
Outcome: results/bench/fullsize_*.json, docs/speed.md.
"""

from __future__ import annotations

import argparse
import itertools
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

from .saved_rows import SavedRows

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
FOLDER = ("model.hub_id=null", "model.variant=null", "model.call.clean_caption=false")
"""Settings with which a full-size model is read from a folder of `make_fullsize`."""
PACKED = "quantised/*/*.safetensors"
"""The packed files of finished groups in an output folder."""
BRANCH = ("format@quant.branch_weight", "format@quant.branch_activation")
BASELINE = "import sys, torch; print('ready', flush=True); sys.stdin.readline()"
BAR = re.compile(r"quantise: +(\d+)%.*?\[([\d:]+)<([\d:?]+)")


def bare_torch() -> int:
    """RssAnon of a process that imports only torch."""
    with subprocess.Popen(
        [sys.executable, "-c", BASELINE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = anonymous_bytes(process.pid)
        process.communicate("\n")
    return found


def seconds_of(clock: str) -> float:
    """Seconds of `1:02:03` or `02:03`."""
    total = 0.0
    for part in clock.split(":"):
        total = 60 * total + float(part)
    return total


def settings_of(method: str, main_format: str) -> list[str]:
    """Overrides of a row, without branch formats for rtn, which has no branch."""
    chosen = [f"method={method}", *FORMATS[main_format]]
    return [s for s in chosen if method != "rtn" or not s.startswith(BRANCH)]


def quantize_command(model: str, folder: Path, overrides: Sequence[str], output: Path) -> list[str]:
    """The command `loraq quantize` on the snapshot in `folder`."""
    command = [sys.executable, "-m", "loraq.cli", "quantize", f"model={model}"]
    return [*command, *FOLDER, f"model.path={folder}", f"output={output}", *overrides]


def run_quantize(
    model: str, folder: Path, overrides: Sequence[str], output: Path, bare: int
) -> dict[str, Any]:
    """Run the command and measure it; exits with the end of its log if it fails.

    bare: the result of `bare_torch`.
    """
    command = quantize_command(model, folder, overrides, output)
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
    return measured | _estimated_seconds(log) | _packed_summary(output)


def _estimated_seconds(log: str) -> dict[str, float | None]:
    """The progress bar's estimated total time after the first tenth, and its final time."""
    shown = [(int(m[1]), seconds_of(m[2]), m[3]) for m in BAR.finditer(log)]
    known = [row for row in shown if row[0] >= 10 and "?" not in row[2]]
    early = [spent + seconds_of(left) for _, spent, left in known]
    last = shown[-1][1] if shown else None
    return {"estimated_seconds": early[0] if early else None, "bar_seconds": last}


def _packed_summary(output: Path) -> dict[str, Any]:
    """Seconds of all groups, mean error and bytes, from the packed files."""
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


def _sort_key(row: dict[str, Any]) -> tuple[int, int]:
    """The order of rows in the record."""
    names = (row["format"], FORMATS), (row["method"], METHODS)
    first, last = ([*known].index(name) if name in known else len(known) for name, known in names)
    return first, last


def row_summary(model: str, row: dict[str, Any]) -> str:
    """One printed line per row."""
    memory = row["peak_above_torch_bytes"] / 2**30
    line = f"{model} {row['format']} {row['method']}: {row['wall_seconds']:.0f} s, "
    line += f"{memory:.2f} GiB above torch"
    if row["estimated_seconds"] is not None:
        line += f"; estimated after a tenth {row['estimated_seconds']:.0f} s, actual "
        line += f"{row['bar_seconds']:.0f} s"
    return line


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="pixart_sigma or sana_1_6b")
    parser.add_argument("folder", type=Path, help="the snapshot of make_fullsize")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="METHOD")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), metavar="FORMAT")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    for name in options.formats:
        if name not in FORMATS:
            raise unknown("format", name, FORMATS)
    rows = SavedRows(options.output, options.model, ("format", "method"), _sort_key)
    asked = itertools.product(options.formats, options.methods)
    missing = [pair for pair in asked if not rows.has(*pair)]
    bare = bare_torch() if missing else 0
    for chosen, method in missing:
        settings = settings_of(method, chosen)
        with tempfile.TemporaryDirectory() as output:
            row = run_quantize(options.model, options.folder, settings, Path(output), bare)
        row |= {"method": method, "format": chosen}
        print(row_summary(options.model, row), flush=True)
        rows.add(row)


if __name__ == "__main__":
    main()
