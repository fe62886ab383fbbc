"""Terminal output: the handler of the `loraq` logger, durations and sizes.

Modules log to `logging.getLogger(__name__)`. Commands and `run` show these messages as plain lines
on stderr. To change this, configure the logger before the call:

    logging.getLogger("loraq").setLevel(logging.ERROR)       # silence
    logging.getLogger("loraq").addHandler(my_handler)        # redirect
"""

from __future__ import annotations

import logging
import sys

LOGGER = logging.getLogger("loraq")


class TerminalHandler(logging.Handler):
    """Writes messages as plain lines to the current `sys.stderr`; warnings start with `loraq:`."""

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if record.levelno >= logging.WARNING:
            text = f"loraq: {text}"
        print(text, file=sys.stderr, flush=True)


def show_messages() -> None:
    """Show messages of level INFO and above on stderr, unless the `loraq` logger has a handler."""
    if LOGGER.handlers:
        return
    LOGGER.addHandler(TerminalHandler())
    LOGGER.propagate = False  # Hydra's own handlers would print every message again
    if LOGGER.level == logging.NOTSET:
        LOGGER.setLevel(logging.INFO)


def duration(seconds: float) -> str:
    """`1 h 05 min`, or `3 min 20 s` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def size_text(size: float) -> str:
    """`1.7 GB`, `96 MB` or `5 kB`."""
    for unit, text in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {text}" if size < 10 * unit else f"{size / unit:.0f} {text}"
    return f"{size / 1e3:.0f} kB"
