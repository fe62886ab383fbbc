"""Whether a quantisation that is killed repeatedly (kill -9) ends with the same bytes.

    python -m experiments.bench.make_fullsize pixart_sigma FOLDER    (once)
    python -m experiments.bench.resume pixart_sigma FOLDER [--method loraq_o2] [--kills 3]
                                       [--output FILE.json]

Runs `loraq quantize` once without interruption. Then runs it with an empty cache, kills it whenever
another fraction of the packed files exists, during the next group, and finally lets it finish.
Compares the bytes of every packed file, and checks that no finished file was rewritten.

Expected time: slightly more than twice the method's time (docs/speed.md).
Outcome: results/bench/resume_*.json.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loraq.errors import LoraqError
from loraq.results import record
from loraq.utils.hashing import cached_hash

from .fullsize import FORMATS, PACKED, quantize_command, settings_of


def run_to_end(command: Sequence[str]) -> float:
    """Run the command; returns seconds."""
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        log = process.stdout.read()
    if process.returncode:
        raise SystemExit(log.decode(errors="replace")[-2000:])
    return time.perf_counter() - begin


def run_and_kill(command: Sequence[str], output: Path, count: int) -> dict[str, Any]:
    """Start the command and kill -9 it shortly after `count` packed files exist."""
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while len(list(output.glob(PACKED))) < count:
            if process.poll() is not None:
                raise LoraqError(f"The run ended before {count} files existed. Use fewer --kills.")
            time.sleep(0.05)
        time.sleep(0.17)  # into the next group
        os.kill(process.pid, signal.SIGKILL)
    return {"files": len(list(output.glob(PACKED))), "seconds": time.perf_counter() - begin}


def modification_times(output: Path) -> dict[str, int]:
    """File name → modification time in nanoseconds of each packed file."""
    return {path.name: path.stat().st_mtime_ns for path in output.glob(PACKED)}


def packed_hashes(output: Path) -> dict[str, str]:
    return {path.name: cached_hash(path) for path in sorted(output.glob(PACKED))}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, compare, print and write the record; exits with an error if bytes differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="pixart_sigma or sana_1_6b")
    parser.add_argument("folder", type=Path, help="the snapshot of make_fullsize")
    parser.add_argument("--method", default="loraq_o2")
    parser.add_argument("--format", choices=FORMATS, default="int4")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    chosen = settings_of(options.method, options.format)
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as broken:
        places = {"whole": Path(whole), "broken": Path(broken)}
        commands = {
            name: quantize_command(options.model, options.folder, chosen, place)
            for name, place in places.items()
        }
        uninterrupted = run_to_end(commands["whole"])
        expected = packed_hashes(places["whole"])
        parts = [len(expected) * n // (options.kills + 1) for n in range(1, options.kills + 1)]
        before, kills = {}, []
        for count in parts:
            kills.append(run_and_kill(commands["broken"], places["broken"], max(1, count)))
            now = modification_times(places["broken"])
            kills[-1]["kept"] = before.items() <= now.items()
            before = now
            print(f"killed after {kills[-1]['files']} of {len(expected)} files", flush=True)
        rest = run_to_end(commands["broken"])
        now = modification_times(places["broken"])
        found = packed_hashes(places["broken"])
        result = {
            "settings": {
                **{name: getattr(options, name) for name in ("model", "method", "format")},
                "files": len(expected),
            },
            "whole_seconds": uninterrupted,
            "kills": kills,
            "rest_seconds": rest,
            "kept": before.items() <= now.items() and all(kill["kept"] for kill in kills),
            "identical": found == expected,
        }
    outcome = "identical bytes" if result["identical"] else "DIFFERENT BYTES"
    total = rest + sum(kill["seconds"] for kill in kills)
    print(
        f"{options.model} {options.method}: {outcome}; {total:.0f} s in {len(kills) + 1} attempts, "
        f"{uninterrupted:.0f} s without interruption"
    )
    if options.output is not None:
        record.save_findings(result, options.output)
    if not (result["identical"] and result["kept"]):
        raise SystemExit("The resumed run differs from the uninterrupted one.")


if __name__ == "__main__":
    main()
