"""Rows of a bench that takes long: saved after each, and never measured again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loraq.errors import LoraqError
from loraq.results import record

Row = dict[str, Any]


class KeptRows:
    """The rows of a record on one model; each is known by its values of `names`.

    output: the record's file; None: nothing is read or written. place: where a row stands.
    settings: those that all rows have in common.
    """

    def __init__(
        self,
        output: Path | None,
        model: str,
        names: Sequence[str],
        place: Callable[[Row], Any],
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._output, self._names, self._place = output, names, place
        self._rest: Row = {"model": model} | ({"settings": settings} if settings else {})
        self.rows: list[Row] = []
        if output is not None and output.is_file():
            found = json.loads(output.read_text(encoding="utf-8"))
            self._check(found)
            self.rows = found["rows"]

    def _check(self, found: Mapping[str, Any]) -> None:
        """Rows of another model or of other settings do not stand in one record with these."""
        asked = {"model": self._rest["model"], **self._rest.get("settings", {})}
        there = {"model": found["model"], **found.get("settings", {})}
        for name, value in asked.items():
            if there.get(name) != value:
                raise LoraqError(
                    f"'{self._output}' was measured with {name}={there.get(name)}, asked is "
                    f"{value}. Give the same, or another file."
                )

    def has(self, *values: Any) -> bool:
        """Whether there is a row with these values of the names."""
        return any(tuple(row[name] for name in self._names) == values for row in self.rows)

    def add(self, row: Row) -> None:
        """Put it in its place and save: a later row may fail."""
        self.rows = sorted(
            [*self.rows, row | {"commit": record.checkout_commit()}], key=self._place
        )
        if self._output is not None:
            record.save_findings({**self._rest, "rows": self.rows}, self._output)
