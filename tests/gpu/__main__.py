"""Check and time a machine with a GPU; write one record.

    python -m tests.gpu [--minutes 10] [--only PART …] [--list] [--dry] [--output FILE.json]

Parts run in order of their value, each with its share of the time; what does not fit is skipped and
named. The record is written after every item, so that an interrupted check leaves what it found.
`--dry` takes every path with tiny models on a CPU, kernels in Triton's interpreter: it shows that
the check itself works, and its times mean nothing. Exit status 1 if something does not hold.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.gpu.setting import Item, Setting


@dataclass(frozen=True)
class Part:
    """A part of the check: its name, its share of the time, and its items."""

    name: str
    share: float
    items: Callable[[Setting], Iterator[Item]]


def parts() -> list[Part]:
    """The parts, the most valuable first."""
    from tests.gpu import right, speed, together

    return [
        Part("right", 0.3, right.items),
        Part("blocks", 0.2, speed.blocks),
        Part("quantising", 0.25, speed.quantising),
        Part("loops", 0.2, speed.loops),
        Part("together", 0.05, together.items),
    ]


class Check:
    """Runs parts within their time and keeps the record.

    minutes: for all parts; a part may use what the parts before it left.
    """

    def __init__(self, setting: Setting, minutes: float, output: Path | None) -> None:
        from loraq.results.record import provenance

        self.setting, self.output = setting, output
        self.origin = provenance(setting.device.type)
        self.seconds = 60 * minutes
        self.started = time.perf_counter()
        self.found: dict[str, dict[str, Any]] = {}

    def run(self, chosen: Sequence[Part]) -> None:
        """Run the items of `chosen` parts; those for which no time is left are only named."""
        until, shares = 0.0, sum(part.share for part in chosen)
        for part in chosen:
            until += self.seconds * part.share / shares
            self.found[part.name] = {"rows": [], "skipped": []}
            for item in part.items(self.setting):
                if self._spent() < until:
                    self._run_item(part.name, item)
                else:
                    self.found[part.name]["skipped"].append(item.name)
                    self._say(f"skipped: {item.name} (the time of '{part.name}' is used up)")
                self._save()
            self._save()

    def _run_item(self, part: str, item: Item) -> None:
        from tests.gpu.setting import release
        from tests.gpu.speed import first_line

        begin = time.perf_counter()
        try:
            row = item.run()
        except Exception as error:  # the others are still worth their time
            row = {"error": first_line(error), "holds": False}
        row = {"name": item.name, "took": time.perf_counter() - begin, **row}
        self.found[part]["rows"].append(row)
        shown = {k: v for k, v in row.items() if k in ("holds", "error", "distance", "seconds")}
        self._say(f"{item.name}: {shown or row.get('ways', '')}")
        release(self.setting.device)

    def failed(self) -> list[str]:
        """What did not hold."""
        rows = (row for part in self.found.values() for row in part["rows"])
        return [f"{row['name']}: {row.get('error', row)}" for row in rows if not _holds(row)]

    def _spent(self) -> float:
        return time.perf_counter() - self.started

    def _say(self, text: str) -> None:
        print(f"[{self._spent():4.0f} s] {text}", flush=True)

    def record(self) -> dict[str, Any]:
        """What was found so far, and where."""
        settings = {"dry": self.setting.dry, "target": self.setting.target}
        settings["seconds"] = self._spent()
        return {"settings": settings, "parts": self.found, **self.origin}

    def _save(self) -> None:
        from loraq.utils.files import write_json
        from loraq.utils.plain import to_plain

        if self.output is not None:
            write_json(self.output, to_plain(self.record(), where="record"))


def _holds(row: dict[str, Any]) -> bool:
    return bool(row.get("holds", True))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--only", nargs="+", metavar="PART")
    parser.add_argument("--list", action="store_true", help="name all items and run none")
    parser.add_argument("--dry", action="store_true", help="tiny models, on a CPU")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    if options.dry or options.list:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported
    from loraq.errors import LoraqError, unknown
    from tests.gpu.setting import Setting

    known = {part.name: part for part in parts()}
    for name in options.only or ():
        if name not in known:
            raise unknown("part", name, known)
    chosen = [part for name, part in known.items() if name in (options.only or known)]
    setting = Setting(options.dry)
    if options.list:
        for part in chosen:
            print(f"{part.name}  ({part.share:.0%} of the time)")
            for item in part.items(setting):
                print(f"  {item.name}")
        return 0
    import torch

    if not options.dry and not torch.cuda.is_available():
        raise LoraqError(
            "make test-gpu needs a GPU, and PyTorch finds none. Take all of its paths on this CPU "
            "with DRY=1, or list its parts with LIST=1."
        )
    from loraq.utils.process import own_gpu

    with own_gpu(setting.device.type):
        check = Check(setting, options.minutes, options.output)
        check.run(chosen)
    print(_next_steps(check))
    for line in check.failed():
        print(f"DOES NOT HOLD  {line}")
    return 1 if check.failed() else 0


def _next_steps(check: Check) -> str:
    """What the blocks say about `compute=auto`, and the commands that use the record."""
    from experiments.bench.kernel_costs import measured

    lines, found = [], check.record()
    if "blocks" in check.found:
        lines += [f"On {check.setting.target}, blocks by the mode of their main product take"]
        lines += [
            f"  {mode}: {row['kernels']} of a 16-bit one by kernels, {row['emulation']} emulated"
            for mode, row in measured(found).items()
        ]
    if check.output is not None:
        lines += ["Next, with the record in a clone: make tables, and the costs of compute=auto by"]
        lines += [f"  python -m experiments.bench.kernel_costs --measured {check.output}"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
