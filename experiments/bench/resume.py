"""kill -9, again and again, while a full-size model is quantised: the same bytes in the end?

    python -m experiments.bench.make_fullsize pixart_sigma FOLDER    (once)
    python -m experiments.bench.resume pixart_sigma FOLDER [--method loraq_o2] [--kills 3]
                                       [--output FILE.json]

`loraq quantize` runs once undisturbed. Then it is started on an empty cache and killed each time
that another part of the layers' files is there, at a moment of its own; what is left runs to the
end. Compared are the bytes of every packed file, and that no finished file was written again.

Expected time: a little over twice the method's own (docs/speed.md).
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

from .fullsize import FORMATS, PACKED, quantise_command, settings_of


def finish(command: Sequence[str]) -> float:
    """Run to the end; seconds."""
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return time.perf_counter() - begin


def kill_at(command: Sequence[str], output: Path, count: int) -> dict[str, Any]:
    """Start, and kill -9 a little after `count` packed files are there."""
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while len(list(output.glob(PACKED))) < count:
            if process.poll() is not None:
                raise LoraqError(f"The run ended before {count} files were there; use fewer kills.")
            time.sleep(0.05)
        time.sleep(0.17)  # into the next group
        os.kill(process.pid, signal.SIGKILL)
    return {"files": len(list(output.glob(PACKED))), "seconds": time.perf_counter() - begin}


def written(output: Path) -> dict[str, int]:
    """When each packed file was written, by its name."""
    return {path.name: path.stat().st_mtime_ns for path in output.glob(PACKED)}


def hashes(output: Path) -> dict[str, str]:
    return {path.name: cached_hash(path) for path in sorted(output.glob(PACKED))}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs, compares, prints, writes the record; an error where bytes differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="pixart_sigma or sana_1_6b")
    parser.add_argument("folder", type=Path, help="what make_fullsize wrote")
    parser.add_argument("--method", default="loraq_o2")
    parser.add_argument("--format", choices=FORMATS, default="int4")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    chosen = settings_of(options.method, options.format)
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as broken:
        places = {"whole": Path(whole), "broken": Path(broken)}
        commands = {
            name: quantise_command(options.model, options.folder, chosen, place)
            for name, place in places.items()
        }
        undisturbed = finish(commands["whole"])
        expected = hashes(places["whole"])
        parts = [len(expected) * n // (options.kills + 1) for n in range(1, options.kills + 1)]
        before, kills = {}, []
        for count in parts:
            kills.append(kill_at(commands["broken"], places["broken"], max(1, count)))
            now = written(places["broken"])
            kills[-1]["kept"] = before.items() <= now.items()
            before = now
            print(f"killed after {kills[-1]['files']} of {len(expected)} files", flush=True)
        rest = finish(commands["broken"])
        now, found = written(places["broken"]), hashes(places["broken"])
        result = {
            "settings": {
                **{name: getattr(options, name) for name in ("model", "method", "format")},
                "files": len(expected),
            },
            "whole_seconds": undisturbed,
            "kills": kills,
            "rest_seconds": rest,
            "kept": before.items() <= now.items() and all(kill["kept"] for kill in kills),
            "identical": found == expected,
        }
    told = "the same bytes" if result["identical"] else "OTHER BYTES"
    in_all = rest + sum(kill["seconds"] for kill in kills)
    print(f"{options.model} {options.method}: {told}; {in_all:.0f} s in {len(kills) + 1} attempts, "
          f"{undisturbed:.0f} s undisturbed")  # fmt: skip
    if options.output is not None:
        record.save_findings(result, options.output)
    if not (result["identical"] and result["kept"]):
        raise SystemExit("A resumed run did not end in an undisturbed one's bytes.")


if __name__ == "__main__":
    main()
