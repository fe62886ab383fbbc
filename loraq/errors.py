"""The exceptions for user errors, and the message for an unknown name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class LoraqError(Exception):
    """A user error: the message contains the value, the limit and the remedy.

    The command line prints it without a traceback and exits with status 2.
    """


class DiskFullError(LoraqError):
    """No space left on the disk. Finished files are kept, partial files are deleted."""


def near_matches(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names that are most similar to `name`, best first."""
    known = [str(candidate) for candidate in known]
    close = difflib.get_close_matches(str(name), known, n=count, cutoff=0.5)
    inside = [candidate for candidate in known if name and str(name).lower() in candidate.lower()]
    return list(dict.fromkeys(close + inside))[:count]


def did_you_mean(matches: Sequence[str]) -> str:
    """The sentence " Did you mean A or B?"; empty without matches."""
    return f" Did you mean {' or '.join(matches)}?" if matches else ""


def unknown(kind: str, name: str, known: Iterable[str]) -> LoraqError:
    """LoraqError for an unknown name: near matches first, then all known names (at most 40)."""
    names = sorted(str(candidate) for candidate in known)
    guess = did_you_mean([repr(match) for match in near_matches(name, names)])
    shown = ", ".join(names[:40]) + (f", … ({len(names)} in all)" if len(names) > 40 else "")
    return LoraqError(f"Unknown {kind} '{name}'.{guess}\n  Known: {shown or 'none'}.")
