"""Differences between repetitions of a row on other machines or with other floating-point rounding.

    python -m experiments.bench.again [--model tiny_sana] [--output outputs] [--to FILE.json]

Reads the committed records and those under OUTPUT, and pairs records with equal recipe, model,
prompts and seeds whose images differ: another processor or library sums float products in another
order, which changes 4-bit codes and then the denoising trajectory. For each pair it reports the
difference of PSNR and LPIPS, later minus earlier, over the same prompts; each record is compared
with the 16-bit images of its own run. Two rows of a table can differ by the root mean square of
these differences for this reason alone; the tables' intervals, which are over prompts, do not
include it.

Expected time: seconds. Outcome: results/bench/again_*.json, docs/protocol.md.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

from loraq.errors import LoraqError
from loraq.metrics.common.intervals import paired_difference
from loraq.results import record
from loraq.results.committed import RECORDS
from loraq.results.record import Record
from loraq.utils.assets import CHECKOUT as ROOT

METRICS = ("psnr", "lpips")
SAME = ("quant", "data", "generate", "calibration", "compute")


def quantized_records(output: Path, model: str) -> list[Record]:
    """The records of all quantised rows of this model, the earliest first."""
    committed = (ROOT / "results").glob(f"*/{RECORDS}/*.json")
    found = map(record.load_record, [*committed, *output.glob("record/*/record.json")])
    mine = [r for r in found if r.config["model"]["name"] == model and r.config["quant"]]
    return sorted(mine, key=lambda r: r.created)


def repeated_pairs(found: Iterable[Record]) -> list[tuple[Record, Record]]:
    """(first, last) record of every group with equal settings, if their images differ."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for one in found:
        if all(one.metrics.get(name, {}).get("per_image") for name in METRICS):
            stated = {name: one.config.get(name) for name in SAME}
            key = [stated, one.model_hash, one.images["names"]]
            groups[json.dumps(key, sort_keys=True)].append(one)
    ends = [(group[0], group[-1]) for group in groups.values()]
    return [(a, b) for a, b in ends if a.images["hash"] != b.images["hash"]]


def compare_pair(first: Record, last: Record) -> dict[str, Any]:
    """One row of the table: first and last value of each metric, and their paired difference."""
    row: dict[str, Any] = {"row": last.label or last.row, "commits": [first.commit, last.commit]}
    for name in METRICS:
        before, after = (r.metrics[name]["per_image"] for r in (first, last))
        difference = paired_difference(after, before)
        row[name] = {"first": first.metrics[name]["value"], "last": last.metrics[name]["value"]}
        row[name] |= difference._asdict()
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, print and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny_sana")
    parser.add_argument("--output", type=Path, default=Path("outputs"))
    parser.add_argument("--to", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    rows = [
        compare_pair(*pair)
        for pair in repeated_pairs(quantized_records(options.output, options.model))
    ]
    if not rows:
        raise LoraqError(
            f"results/ and '{options.output}' contain no row of {options.model} that was repeated "
            "with different images. Run one of its experiments on another machine first."
        )
    spread = {
        name: sqrt(sum(row[name]["mean"] ** 2 for row in rows) / len(rows)) for name in METRICS
    }
    for row in sorted(rows, key=lambda row: row["psnr"]["mean"]):
        print(f"{row['psnr']['mean']:+.2f} dB  {row['lpips']['mean']:+.4f}  {row['row']}")
    print(f"root mean square of {len(rows)}: {spread['psnr']:.2f} dB, LPIPS {spread['lpips']:.4f}")
    if options.to is not None:
        result = {"settings": {"model": options.model}, "rows": rows, "root_mean_square": spread}
        record.save_findings(result, options.to)


if __name__ == "__main__":
    main()
