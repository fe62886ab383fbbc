"""Rows of a slow benchmark: saved one by one, and not measured again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loraq.errors import LoraqError
from loraq.results import record

Row = dict[str, Any]


class SavedRows:
    """The rows of a record of one model, each identified by its values of `names`.

    output: the record's file; None reads and writes nothing. sort_key: the order of the rows.
    settings: the settings that all rows share. Raises LoraqError if the file has another model or
    other settings.
    """

    def __init__(
        self,
        output: Path | None,
        model: str,
        names: Sequence[str],
        sort_key: Callable[[Row], Any],
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._output, self._names, self._sort_key = output, names, sort_key
        self._rest: Row = {"model": model} | ({"settings": settings} if settings else {})
        self.rows: list[Row] = []
        if output is not None and output.is_file():
            found = json.loads(output.read_text(encoding="utf-8"))
            self._check_settings(found)
            self.rows = found["rows"]

    def __repr__(self) -> str:
        return f"SavedRows({len(self.rows)} rows by {', '.join(self._names)}, {self._output})"

    def _check_settings(self, found: Mapping[str, Any]) -> None:
        """One record contains only rows of one model and equal settings."""
        requested = {"model": self._rest["model"], **self._rest.get("settings", {})}
        there = {"model": found["model"], **found.get("settings", {})}
        for name, value in requested.items():
            if there.get(name) != value:
                raise LoraqError(
                    f"'{self._output}' was measured with {name}={there.get(name)}, but {value} "
                    "is requested. Use the same value, or another file."
                )

    def has(self, *values: Any) -> bool:
        """Whether a row with these values of `names` exists."""
        return any(tuple(row[name] for name in self._names) == values for row in self.rows)

    def add(self, row: Row) -> None:
        """Insert the row and save the file, so that it is kept if a later row fails."""
        added = row | {"commit": record.checkout_commit()}
        self.rows = sorted([*self.rows, added], key=self._sort_key)
        if self._output is not None:
            record.save_findings({**self._rest, "rows": self.rows}, self._output)
