"""Rewrite the generated parts of README, docs and results/: `python -m loraq.readme [--check]`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from loraq.errors import LoraqError
from loraq.results.pages.refresh import refresh_all
from loraq.utils.assets import CHECKOUT
from loraq.utils.failures import reporting_errors


def main(arguments: Sequence[str] | None = None) -> None:
    """Rewrite files that are out of date; with `--check`, only list them and exit with 2."""
    parser = argparse.ArgumentParser(
        prog="python -m loraq.readme",
        description="Rewrite the generated parts of README, docs and results/ from records.",
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 2 if a file is out of date"
    )
    options = parser.parse_args(arguments)
    with reporting_errors():
        stale = [str(path.relative_to(CHECKOUT)) for path in refresh_all(options.check)]
        if stale and options.check:
            raise LoraqError(
                f"out of date: {', '.join(stale)}. Rewrite them with: python -m loraq.readme"
            )
        print("\n".join(f"rewritten: {name}" for name in stale) or "everything is up to date")


if __name__ == "__main__":
    main()
