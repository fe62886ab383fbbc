"""The folder of an experiment's tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loraq.runner.rows import Row
from loraq.utils.hashing import key


def result_folder(rows: Sequence[Row], overrides: Sequence[str]) -> Path:
    """EXPERIMENT, EXPERIMENT-MODEL or EXPERIMENT-HASH: other settings have other folders.

    One method's run (no experiment) is called by it: METHOD, METHOD-HASH. A single row of an
    experiment (`row=NAME`) is kept below its folder: rows/NAME.
    """
    config = rows[0].config
    neutral = ("experiment=", "output=", "device=", "threads=", "tracking")
    changed = sorted(o for o in overrides if not o.startswith(neutral))
    models = [o.removeprefix("model=") for o in changed if o.startswith("model=")]
    whole = not any(o.startswith("experiment=") for o in overrides)
    single = [] if whole else [o.removeprefix("row=") for o in changed if o.startswith("row=")]
    others = [o for o in changed if not o.startswith(("model=", "method=" if whole else "row="))]
    name = rows[-1].config.method if whole else config.experiment
    parts = [name, *models, *([key(others)[:6]] if others else [])]
    folder = Path(config.output) / "results" / "-".join(parts)
    return folder / "rows" / single[0] if single else folder
