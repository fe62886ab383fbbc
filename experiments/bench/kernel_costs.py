"""Write the table that `compute=auto` reads: layers by kernels and by emulation over 16-bit ones.

    python -m experiments.bench.kernel_costs                                     (modelled)
    python -m experiments.bench.kernel_costs --measured results/bench/gpu.json   (measured)

Modelled costs come from `results/bench/kernel_counts.json`: the layers of PixArt-Σ and SANA at
batch 16, summed, over a 16-bit product compiled alike. Emulation also quantises x̃ in one launch and
computes h in a second; its product of weight and L is a 16-bit one. Measured costs come from the
blocks of `python -m tests.gpu`'s record at its largest batch, and replace its architecture's row.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from experiments.bench.kernel_counts import RANK, SHAPES
from loraq.errors import LoraqError
from loraq.layers.kernel_costs import TABLE
from loraq.utils.files import write_json

COUNTS = Path("results/bench/kernel_counts.json")
# mode of the main product → recipe that stands for it
INT, MX, OTHER = "int4, int8 branch", "mxfp4, mxfp8 branch", "nvfp4, mxfp8 branch"
BLOCK_SCALED = ("sm10", "sm11", "sm12", "gfx95")


def mode_recipes(target: str) -> dict[str, str]:
    """The recipe that stands for each mode of the main product."""
    if target.startswith(BLOCK_SCALED):
        return {"int": INT, "scaled": MX, "values": OTHER}
    return {"int": INT, "values": MX}


def modelled(counts: dict[str, Any]) -> dict[str, Any]:
    """The table from modelled times."""
    return {
        target: {
            mode: _modelled(found[recipe]["times"], found["bf16"]["times"])
            for mode, recipe in mode_recipes(target).items()
        }
        for target, found in counts.items()
    }


def _modelled(times: dict[str, Any], bf16: dict[str, Any]) -> dict[str, float]:
    base = kernels = emulation = 0.0
    for model, (_, shapes) in SHAPES.items():
        for outputs, width in shapes:
            name = f"{model} {width}→{outputs}"
            parts, product = times[name]["milliseconds"], bf16[name]["milliseconds"]["linear"]
            base += product
            kernels += sum(parts.values())
            emulation += parts["quantize_input"] + parts["down"] + product * (1 + RANK / width)
    return {"kernels": round(kernels / base, 2), "emulation": round(emulation / base, 2)}


def measured(record: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The row of the record's architecture, from the blocks that were timed."""
    rows = [row["ways"] for row in _largest(record["parts"]["blocks"]["rows"])]
    found: dict[str, dict[str, float]] = {}
    for mode, recipe in mode_recipes(record["settings"]["target"]).items():
        main = recipe.partition(",")[0]  # whatever the branch
        ratios = {
            way: [
                row["ratio"]
                for ways in rows
                for name, row in ways.items()
                if name.startswith(main) and name.endswith(word)
            ]
            for way, word in (("kernels", "kernels"), ("emulation", "emulated"))
        }
        if all(ratios.values()):
            found[mode] = {way: round(mean(values), 2) for way, values in ratios.items()}
    return found


def _largest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The blocks of the largest batch that were timed."""
    timed = [row for row in rows if "ways" in row]
    return [row for row in timed if row["images"] == max(other["images"] for other in timed)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the table, and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measured", type=Path, metavar="RECORD")
    options = parser.parse_args(arguments)
    if options.measured:
        table = json.loads(TABLE.read_text(encoding="utf-8"))
        record = json.loads(options.measured.read_text(encoding="utf-8"))
        target, found = record["settings"]["target"], measured(record)
        if record["settings"]["dry"] or not found:
            raise LoraqError(
                f"{options.measured} has no block that a GPU ran by kernels and by emulation. Make "
                "it by `make test-gpu` on a GPU."
            )
        table["costs"].setdefault(target, {}).update(found)
        table["origins"][target] = f"measured ({', '.join(found)}): {options.measured}"
    else:
        costs = modelled(json.loads(COUNTS.read_text(encoding="utf-8"))["now"])
        table = {"origins": dict.fromkeys(costs, f"modelled: {COUNTS}"), "costs": costs}
    write_json(TABLE, table)
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
