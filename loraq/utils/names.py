"""Names that become files or folders, and labels that become cells of tables."""

from __future__ import annotations

from loraq.errors import LoraqError

LONGEST = 100
"""Characters of a name; paths add keys, endings and folders, and file systems allow 255 bytes."""
_NOT_IN_FILES = '/\\:*?"<>|'
_RESERVED = {"con", "prn", "aux", "nul"} | {f"{p}{n}" for p in ("com", "lpt") for n in range(1, 10)}


def check_file_name(key: str, name: str) -> None:
    """LoraqError unless every file system accepts `name` as the name of a file.

    key: the setting that holds it, for the error.
    """
    remedy = "Use letters, digits, spaces and . _ - +"
    if wrong := sorted({c for c in name if c in _NOT_IN_FILES or not c.isprintable()}):
        raise LoraqError(
            f"{key}={name!r} names a file, and {', '.join(map(repr, wrong))} cannot be part of its "
            f"name. {remedy}."
        )
    if not name or name != name.strip(" ") or name.endswith(".") or name.startswith((".", "~")):
        raise LoraqError(
            f"{key}={name!r} names a file; it must not be empty, begin or end with a space or a "
            f"dot, or begin with '~'. {remedy}."
        )
    if name.split(".")[0].lower() in _RESERVED:
        raise LoraqError(
            f"{key}={name!r} names a file, and Windows reserves this name. Choose another one."
        )
    check_length(key, name)


def check_label(key: str, label: str) -> None:
    """LoraqError unless `label` is one line of printable text."""
    if wrong := sorted({c for c in label if not c.isprintable()}):
        raise LoraqError(
            f"{key}={label!r} must be one line of text without {', '.join(map(repr, wrong))}. "
            "Write it on one line."
        )
    if not label.strip():
        raise LoraqError(f"{key}={label!r} is empty. Write a label, or leave it out.")
    check_length(key, label)


def check_length(key: str, text: str) -> None:
    """LoraqError for a text of more than `LONGEST` bytes."""
    if (length := len(text.encode("utf-8", "surrogatepass"))) > LONGEST:
        raise LoraqError(
            f"{key}='{text[:20]}…' has {length:,} bytes; the limit is {LONGEST}. Shorten it."
        )
