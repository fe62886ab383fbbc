"""Take finished experiments over into results/: `python -m loraq.results outputs/results/NAME`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from loraq.results.committed import changed_checkouts, read_results, take_over, take_over_row
from loraq.results.pages.refresh import refresh_all
from loraq.utils.assets import CHECKOUT
from loraq.utils.console import reporting_errors


def main(arguments: Sequence[str] | None = None) -> None:
    """Take each folder over, then rewrite tables and pages."""
    parser = argparse.ArgumentParser(
        prog="python -m loraq.results",
        description="Take finished experiments over into results/, then rebuild tables and docs.",
    )
    parser.add_argument("folders", nargs="+", type=Path, help="such as outputs/results/demo")
    with reporting_errors():
        for folder in parser.parse_args(arguments).folders:
            one_row = folder.resolve().parent.name == "rows"
            target = take_over_row(folder) if one_row else take_over(folder)
            print(
                f"{target.relative_to(CHECKOUT)}: {len(read_results(target.name).records)} records"
            )
            if rows := changed_checkouts(read_results(target.name)):
                print(
                    f"  made from uncommitted code: {', '.join(rows)}. Their tables say so; "
                    "commit and run again before quoting them.",
                    file=sys.stderr,
                )
        for path in refresh_all():
            print(f"rewritten: {path.relative_to(CHECKOUT)}")


if __name__ == "__main__":
    main()
