"""Run a campaign, print its table and what did not hold, and write its record.

    python -m tests.faults [--minutes 18] [--seed 0] [--workers 2] [--only KIND[:NUMBER]]
                           [--output FILE.json]

Trials that the same code with the same seed has run before are not run again; `--fresh` runs them.
Exit status 1 if a trial does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from loraq.results import record
from loraq.runner.sweep.jobs import code_hash
from loraq.utils.assets import CHECKOUT
from loraq.utils.hashing import key

KINDS = ("killed", "damaged", "together", "obstacle")
ORDER = ("killed", "damaged", "killed", "damaged", "obstacle", "damaged", "killed", "together")
"""Kinds in the order in which trials are started."""
COPIED = ("loraq", "conf", "tests", "experiments", "results")
KEPT = CHECKOUT / "outputs" / "faults"


def numbered(only: str | None) -> Iterator[tuple[str, int]]:
    """The trials in order, without an end unless `only` names a single one."""
    kind, _, number = (only or "").partition(":")
    if number:
        yield kind, int(number)
        return
    count: Counter[str] = Counter()
    while True:
        for one in [kind] if kind else ORDER:
            yield one, count[one]
            count[one] += 1


class Campaign:
    """Trials that are handed to workers, and their answers, kept in a file as they come."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        KEPT.mkdir(parents=True, exist_ok=True)
        own = [path.read_text() for path in sorted(Path(__file__).parent.glob("*.py"))]
        self.file = KEPT / f"{key(code_hash(), own, options.seed)}.jsonl"
        if options.fresh:
            self.file.unlink(missing_ok=True)
        lines = self.file.read_text().splitlines() if self.file.is_file() else []
        self.answers: list[dict[str, Any]] = [json.loads(line) for line in lines]
        self.done = {(one["kind"], one["number"]) for one in self.answers}
        self.broken: list[str] = []
        self.queue: Queue[tuple[str, int]] = Queue(1)
        self.stop = threading.Event()
        self.lock = threading.Lock()

    def run(self, home: Path) -> None:
        """Start the workers, feed them until the time is over, and wait for their last answers."""
        from tqdm import tqdm

        threads = []
        self.bar = tqdm(total=round(60 * self.options.minutes), unit="s", dynamic_ncols=True)
        started, shown = time.monotonic(), 0.0
        for number in range(self.options.workers):
            thread = threading.Thread(target=self._serve, args=(home / f"worker-{number}",))
            thread.start()
            threads.append(thread)
        trials = numbered(self.options.only)
        waiting: tuple[str, int] | None = None
        while any(thread.is_alive() for thread in threads):
            spent = time.monotonic() - started
            self.bar.n = min(round(spent), self.bar.total)
            if spent - shown > 0.5:
                shown = spent
                self.bar.refresh()
            if spent > 60 * self.options.minutes or self.broken:
                break
            if waiting is None:
                waiting = next(trials, None)
                if waiting is None:
                    break
                if waiting in self.done and self.options.only is None:
                    waiting = None
                    continue
            if self.queue.empty():
                self.queue.put(waiting)
                waiting = None
            time.sleep(0.02)
        while not self.queue.empty() and self.options.only and any(t.is_alive() for t in threads):
            time.sleep(0.02)
        self.stop.set()
        for thread in threads:
            thread.join()
        self.bar.close()

    def _serve(self, home: Path) -> None:
        copy = home / "copy"
        for name in COPIED:
            shutil.copytree(CHECKOUT / name, copy / name, symlinks=True,
                            ignore=shutil.ignore_patterns("__pycache__"))  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.faults.worker", str(home), str(self.options.seed)]
        with subprocess.Popen(
            command, cwd=home, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        ) as worker:  # fmt: skip
            assert worker.stdin is not None and worker.stdout is not None
            while not self.stop.is_set():
                try:
                    kind, number = self.queue.get(timeout=0.1)
                except Empty:
                    continue
                print(kind, number, file=worker.stdin, flush=True)
                answer = worker.stdout.readline()
                if not answer:
                    self.broken.append(f"the worker of {kind}:{number} has died")
                    return
                self._keep(json.loads(answer))
            worker.stdin.close()

    def _keep(self, answer: dict[str, Any]) -> None:
        with self.lock:
            if "broken" in answer:
                self.broken.append(f"{answer['kind']}:{answer['number']}: {answer['broken']}")
                return
            self.answers.append(answer)
            with self.file.open("a") as stream:
                stream.write(json.dumps(answer) + "\n")
            held = sum(one["held"] for one in self.answers)
            self.bar.set_description(f"{len(self.answers)} tried, {held} held")


def unmount_all(home: Path) -> None:
    """Unmount disks that a stopped trial has left."""
    for line in Path("/proc/mounts").read_text().splitlines():
        if (folder := line.split()[1]).startswith(f"{home}/"):
            subprocess.run(["umount", "--lazy", folder], check=False)


def counts(answers: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, int]]]:
    """Kind → place → tried and held."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for one in sorted(answers, key=lambda one: (KINDS.index(one["kind"]), one["where"])):
        row = found.setdefault(one["kind"], {}).setdefault(one["where"], {"tried": 0, "held": 0})
        row["tried"] += 1
        row["held"] += one["held"]
    return found


def table(found: dict[str, dict[str, dict[str, int]]]) -> str:
    """The counts as text."""
    lines = [f"{'kind':10} {'where':26} {'tried':>6} {'held':>6}"]
    for kind, rows in found.items():
        for where, row in rows.items():
            lines.append(f"{kind:10} {where:26} {row['tried']:6} {row['held']:6}")
        tried, held = (sum(row[name] for row in rows.values()) for name in ("tried", "held"))
        lines.append(f"{kind:10} {'all':26} {tried:6} {held:6}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the trials, print, and write the record."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--minutes", type=float, default=18.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", metavar="KIND[:NUMBER]", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--fresh", action="store_true", help="forget earlier trials of this seed")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the record")
    options = parser.parse_args(arguments)
    if options.only and options.only.partition(":")[0] not in KINDS:
        parser.error(f"--only {options.only}: the kinds are {', '.join(KINDS)}")
    campaign = Campaign(options)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as home:
        try:
            campaign.run(Path(home))
        finally:
            unmount_all(Path(home))
    command = f"python -m tests.faults --seed {options.seed} --only"
    failed = [one for one in campaign.answers if not one["held"]]
    for one in failed:
        print(f"\n{command} {one['kind']}:{one['number']}    {one['where']}: {one['what']}")
        print("\n".join(f"  {line}" for line in one["failures"]))
        if ":" in (options.only or ""):
            print("\n".join(one["output"]))
    found = counts(campaign.answers)
    print(f"\n{table(found)}")
    if campaign.broken:
        raise SystemExit("\n".join(campaign.broken))
    if options.output is not None:
        record.save_findings(
            {
                "settings": {"seed": options.seed, "workers": options.workers},
                "seconds": time.monotonic() - started,
                "commands": sum(one["commands"] for one in campaign.answers),
                "counts": found,
                "not_held": [
                    {name: one[name] for name in ("kind", "number", "where", "what", "failures")}
                    for one in failed
                ],
            },
            options.output,
        )
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
