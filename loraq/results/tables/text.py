"""A table of cells and its text: Markdown (aligned, also for terminals), LaTeX, CSV.

A cell without a value or an interval has a reason. Reasons become lettered footnotes; a reason that
holds for a complete column is marked at the column's title.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, field
from string import ascii_lowercase
from typing import Any

SUPERSCRIPTS = "ᵃᵇᶜᵈᵉᶠᵍʰⁱʲᵏˡᵐⁿᵒᵖ"
_LATEX = {
    **{"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$"},
    **{"{": r"\{", "}": r"\}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}"},
    **{"↑": r"$\uparrow$", "↓": r"$\downarrow$", "×": r"$\times$", "³": r"$^3$", "−": "$-$"},
    **{"∞": r"$\infty$", "–": "--", "≤": r"$\le$", "ø": r"\o{}"},
    **{mark: rf"\textsuperscript{{{ascii_lowercase[i]}}}" for i, mark in enumerate(SUPERSCRIPTS)},
}


@dataclass(frozen=True)
class Cell:
    """A number with its interval, or the reason why it has none.

    digits: decimals after multiplication by `scale`. mark: text after the number, such as "better".
    sign: whether positive numbers get a "+".
    """

    value: float | None = None
    lo: float | None = None
    hi: float | None = None
    digits: int = 2
    scale: float = 1.0
    reason: str = ""
    mark: str = ""
    sign: bool = False

    @property
    def bare(self) -> bool:
        """Whether the cell has no interval."""
        return self.value is None or self.lo is None or self.hi is None

    def text(self) -> str:
        """Number, interval and mark, separated by spaces; "–" without a value."""
        if self.value is None:
            return "–"
        return " ".join(filter(None, (self.number(), self.interval(), self.mark)))

    def number(self) -> str:
        """The value as text; "–" without a value."""
        return "–" if self.value is None else self._number(self.value, self.sign)

    def interval(self) -> str:
        """The interval as text, "[lo, hi]"; empty without an interval."""
        if self.lo is None or self.hi is None:
            return ""
        return f"[{self._number(self.lo)}, {self._number(self.hi)}]"

    def _number(self, number: float, sign: bool = False) -> str:
        text = f"{number * self.scale:.{self.digits}f}"
        if text.startswith("-") and float(text) == 0:
            text = text[1:]
        return f"+{text}" if sign and not text.startswith("-") else text


Item = str | int | Cell


@dataclass(frozen=True)
class Table:
    """A title, column titles, rows of texts, counts or cells, and notes below the table."""

    title: str
    columns: list[str]
    rows: list[list[Item]]
    notes: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"Table({self.title!r}, {len(self.rows)} rows × {len(self.columns)} columns)"


def to_markdown(table: Table) -> str:
    """Return a Markdown table with aligned columns, the title above and the notes below it."""
    columns, rows, notes = _texts(table)
    rows = [[_in_markdown(text) for text in row] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(columns, *rows, strict=True)]
    lines = [_padded(columns, widths)]
    rules = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines.append("| " + " | ".join(rules) + " |")
    lines += [_padded(row, widths) for row in rows]
    title = _in_markdown(table.title)
    return "\n".join([f"**{title}**", "", *lines, "", *(f"- {note}" for note in notes), ""])


def to_latex(table: Table) -> str:
    """Return a tabular for the LaTeX package booktabs, followed by the notes as comments."""
    columns, rows, notes = _texts(table)
    lines = [
        _comment(table.title),
        r"\begin{tabular}{l" + "r" * (len(columns) - 1) + "}",
        r"\toprule",
    ]
    lines += [" & ".join(map(_escaped, columns)) + r" \\", r"\midrule"]
    lines += [" & ".join(map(_escaped, row)) + r" \\" for row in rows]
    lines += [r"\bottomrule", r"\end{tabular}", *map(_comment, notes), ""]
    return "\n".join(lines)


def to_csv(table: Table) -> str:
    """Return CSV of unscaled numbers; a column of cells becomes three columns: value, lo, hi.

    Numbers have ten significant digits: further digits of an interval depend on the machine that
    makes the table.
    """
    wide = [any(isinstance(row[i], Cell) for row in table.rows) for i in range(len(table.columns))]
    header: list[str] = []
    for title, cells in zip(table.columns, wide, strict=True):
        title = title.replace(" ×10³", "").rstrip(" ↑↓")
        header += [title, f"{title} lo", f"{title} hi"] if cells else [title]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    for row in table.rows:
        line: list[Any] = []
        for item, cells in zip(row, wide, strict=True):
            if isinstance(item, Cell):
                line += map(_ten_digits, (item.value, item.lo, item.hi))
            else:
                line += [item, None, None] if cells else [item]
        writer.writerow(line)
    return out.getvalue()


def _texts(table: Table) -> tuple[list[str], list[list[str]], list[str]]:
    """Return titles, rows and notes as text, with the footnotes' letters added."""
    letters: dict[str, str] = {}

    def letter(reason: str) -> str:
        if not reason:
            return ""
        if reason not in letters:
            place = len(letters)
            known = place < len(SUPERSCRIPTS)
            letters[reason] = SUPERSCRIPTS[place] if known else f" ({place + 1})"
        return letters[reason]

    columns = list(table.columns)
    common = [_common_reason([row[i] for row in table.rows]) for i in range(len(columns))]
    for i, reason in enumerate(common):
        columns[i] += letter(reason)
    rows = []
    for row in table.rows:
        texts = []
        for i, item in enumerate(row):
            if isinstance(item, Cell):
                marked = item.bare and item.reason != common[i]
                texts.append(item.text() + (letter(item.reason) if marked else ""))
            else:
                texts.append(f"{item:,}" if isinstance(item, int) else item.replace("|", "/"))
        rows.append(texts)
    return (
        columns,
        rows,
        [*table.notes, *(f"{mark.strip()} {why}" for why, mark in letters.items())],
    )


def _common_reason(items: list[Item]) -> str:
    """Return the reason that all values of a column without intervals share, or ""."""
    cells = [item for item in items if isinstance(item, Cell)]
    if not cells or not all(cell.bare for cell in cells):
        return ""
    reasons = [cell.reason for cell in cells if cell.value is not None]
    return reasons[0] if reasons and len(set(reasons)) == 1 else ""


def _ten_digits(number: float | None) -> str | None:
    return None if number is None else f"{number:.10g}"


def _padded(texts: list[str], widths: list[int]) -> str:
    first = texts[0].ljust(widths[0])
    rest = [text.rjust(width) for text, width in zip(texts[1:], widths[1:], strict=True)]
    return "| " + " | ".join([first, *rest]) + " |"


def _in_markdown(text: str) -> str:
    """A text in which no letter starts HTML, emphasis or code."""
    return "".join(f"\\{letter}" if letter in "<*`" else letter for letter in text)


def _comment(text: str) -> str:
    """A LaTeX comment, which ends at a line break."""
    return f"% {' '.join(text.split())}"


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)
