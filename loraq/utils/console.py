"""Messages for people on a terminal: errors without a traceback, durations."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from loraq.errors import LoraqError


@contextlib.contextmanager
def reporting_errors() -> Iterator[None]:
    """Print a LoraqError without a traceback and exit with 2; on Ctrl-C exit with 130."""
    try:
        yield
    except LoraqError as error:
        print(f"loraq: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(
            "\nloraq: interrupted. Finished work is kept; run the same command again to resume.",
            file=sys.stderr,
        )
        raise SystemExit(130) from None


def duration(seconds: float) -> str:
    """`1 h 05 min`, or `3 min 20 s` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
