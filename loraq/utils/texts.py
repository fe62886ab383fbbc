"""Texts: lists that a caller gives in Python, and what an error says."""

from __future__ import annotations

from collections.abc import Iterable

from loraq.errors import LoraqError


def list_of_texts(values: Iterable[str], name: str) -> list[str]:
    """The values of the argument `name` as a list.

    LoraqError for a single text, which Python would read letter by letter, and for values that are
    not text.
    """
    if isinstance(values, str | bytes):
        raise LoraqError(f"{name}={values!r} is one text, not a list. Write {name}=[{values!r}].")
    if not isinstance(values, Iterable):
        raise LoraqError(f"{name} is of the type {type(values).__name__}. Pass a list of texts.")
    listed = list(values)
    for place, value in enumerate(listed):
        if not isinstance(value, str):
            raise LoraqError(f"{name}[{place}]={value!r} is not text. Pass a list of texts.")
    return listed


def first_line(error: BaseException) -> str:
    """The first line of an error's text; without one, the name of its type."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
