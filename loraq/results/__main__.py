"""Import finished experiments into results/: `python -m loraq.results outputs/results/NAME`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from loraq.results.committed import (
    import_experiment,
    import_row,
    read_results,
    rows_from_changed_code,
)
from loraq.results.pages.refresh import refresh_all
from loraq.utils.assets import CHECKOUT
from loraq.utils.failures import reporting_errors


def main(arguments: Sequence[str] | None = None) -> None:
    """Import each folder, then rebuild the tables and documentation pages."""
    parser = argparse.ArgumentParser(
        prog="python -m loraq.results",
        description="Import finished experiments into results/, then rebuild tables and docs.",
    )
    parser.add_argument("folders", nargs="+", type=Path, help="such as outputs/results/demo")
    with reporting_errors():
        for folder in parser.parse_args(arguments).folders:
            one_row = folder.resolve().parent.name == "rows"
            target = import_row(folder) if one_row else import_experiment(folder)
            print(
                f"{target.relative_to(CHECKOUT)}: {len(read_results(target.name).records)} records"
            )
            if rows := rows_from_changed_code(read_results(target.name)):
                print(
                    f"  made from uncommitted code: {', '.join(rows)}. Their tables state this; "
                    "commit the code and run them again before citing them.",
                    file=sys.stderr,
                )
        for path in refresh_all():
            print(f"rewritten: {path.relative_to(CHECKOUT)}")


if __name__ == "__main__":
    main()
