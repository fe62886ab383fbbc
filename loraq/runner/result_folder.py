"""The folder of an experiment's tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loraq.runner.rows import Row
from loraq.utils.hashing import key


def result_folder(rows: Sequence[Row], overrides: Sequence[str]) -> Path:
    """OUTPUT/results/NAME[-MODEL][-HASH]; HASH covers all other overrides that change results.

    NAME is the experiment, or the method if no experiment is set. A single row of an experiment
    (`row=ROW`) is in the subfolder rows/ROW.
    """
    config = rows[0].config
    neutral = ("experiment=", "output=", "device=", "threads=", "tracking")
    changed = sorted(o for o in overrides if not o.startswith(neutral))
    models = [o.removeprefix("model=") for o in changed if o.startswith("model=")]
    method_run = not any(o.startswith("experiment=") for o in overrides)
    single = [] if method_run else [o.removeprefix("row=") for o in changed if o.startswith("row=")]
    others = [
        o for o in changed if not o.startswith(("model=", "method=" if method_run else "row="))
    ]
    name = rows[-1].config.method if method_run else config.experiment
    parts = [name, *models, *([key(others)[:6]] if others else [])]
    folder = Path(config.output) / "results" / "-".join(parts)
    return folder / "rows" / single[0] if single else folder
