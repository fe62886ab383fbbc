"""The one exception that a user can cause, and how an unknown name is answered."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class LoraqError(Exception):
    """A mistake outside the code: the message holds the value, the limit and the remedy.

    The command line prints it without a traceback and exits with 2.
    """


class DiskFullError(LoraqError):
    """No space left: what was finished stays, nothing half-written does, and the run stops."""


def near_matches(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names that look most like `name`, best first."""
    known = [str(candidate) for candidate in known]
    close = difflib.get_close_matches(str(name), known, n=count, cutoff=0.5)
    inside = [candidate for candidate in known if name and str(name).lower() in candidate.lower()]
    return list(dict.fromkeys(close + inside))[:count]


def did_you_mean(shown: Sequence[str]) -> str:
    """The sentence that offers near matches, as they are shown; nothing without any."""
    return f" Did you mean {' or '.join(shown)}?" if shown else ""


def unknown(kind: str, name: str, known: Iterable[str]) -> LoraqError:
    """The answer to an unknown name: the near matches first, then everything there is."""
    names = sorted(str(candidate) for candidate in known)
    guess = did_you_mean([repr(match) for match in near_matches(name, names)])
    shown = ", ".join(names[:40]) + (f", … ({len(names)} in all)" if len(names) > 40 else "")
    return LoraqError(f"Unknown {kind} '{name}'.{guess}\n  Known: {shown or 'none'}.")
