"""The text of a prompt file; a file in another encoding is refused with its line."""

from __future__ import annotations

import codecs
from pathlib import Path

from loraq.errors import LoraqError

# A byte order mark at the start of the file names its encoding. That of UTF-32 starts with that of
# UTF-16, so it comes first.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
    codecs.BOM_UTF8: "utf-8",
}
_STRAY = {"\0": "a NUL byte", "\ufeff": "a byte order mark that is not at the start of the file"}


def read_text(path: Path) -> str:
    r"""The text of a file in UTF-8, or in the encoding that its byte order mark names.

    Line ends (\r\n, \r and \n) become \n. LoraqError with the line for bytes of another encoding.
    """
    data = path.read_bytes()
    mark = next((mark for mark in _MARKS if data.startswith(mark)), b"")
    encoding, data = _MARKS.get(mark, "utf-8"), data[len(mark) :]
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        before = data[: error.start].decode(encoding, "ignore")
        found = data[error.start : error.start + 4].hex(" ")
        raise _refusal(path, before, f"the bytes {found} are not text in {encoding}") from None
    for character, what in _STRAY.items():
        before, found, _ = text.partition(character)
        if found:
            raise _refusal(path, before, what)
    return _same_line_ends(text)


def read_lines(path: Path) -> list[str]:
    """The lines of a file, without blank ones at its end; LoraqError for other blank lines."""
    texts = read_text(path).split("\n")
    while texts and not texts[-1].strip():
        texts.pop()
    if blank := [str(number) for number, text in enumerate(texts, 1) if not text.strip()]:
        raise LoraqError(
            f"'{path}': {len(blank)} of {len(texts)} lines are blank, the first is line "
            f"{blank[0]}. Write a prompt there, or remove the line."
        )
    return texts


def _same_line_ends(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _refusal(path: Path, before: str, reason: str) -> LoraqError:
    line = _same_line_ends(before).count("\n") + 1
    return LoraqError(f"'{path}', line {line}: {reason}. Save the file as UTF-8.")
