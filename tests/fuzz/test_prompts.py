"""Prompt files: what is read is what an independent reader finds; all else is refused in words."""

from __future__ import annotations

import csv
import io
import json

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loraq.data import readers
from loraq.data.prompt import Prompt
from loraq.data.readers import read_prompts
from loraq.data.sets import read_by_suffix
from tests.fuzz.conftest import REFUSED

pytestmark = pytest.mark.fuzz
COLUMNS = ("prompt", "Prompt", "Prompts", "prompts")
SUFFIXES = (".txt", ".jsonl", ".json", ".yaml", ".csv", ".tsv")
MARKS = {
    "utf-8": b"",
    "utf-8-sig": b"",
    "utf-16-le": b"\xff\xfe",
    "utf-16-be": b"\xfe\xff",
    "utf-32-le": b"\xff\xfe\x00\x00",
}
TEXTS = st.lists(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"), min_size=1)
    .filter(str.strip),
    min_size=1,
    max_size=5,
)  # fmt: skip
FRAGMENTS = [
    *(
        b"prompt",
        b"Prompts",
        b"a cat",
        b"b",
        b" ",
        b"\n",
        b"\r\n",
        b"\r",
        b"\n\n",
        b",",
        b";",
        b"\t",
    ),
    *(b'"', b'""', b"'", b":", b": ", b"- ", b"{", b"}", b"[", b"]", b"null", b"12", b"yes", b"~"),
    *(
        b'{"prompt": "a"}',
        b'"a": ',
        b'"b"',
        b"\\",
        b"\\ud800",
        b"\\u0000",
        b"&a ",
        b"*a",
        b"<<",
        b"#",
    ),
    *(
        b"\xef\xbb\xbf",
        b"\xff\xfe",
        b"\x00",
        b"\xe9",
        "é\u2028\x85".encode(),
        b"|\n ",
        b"? ",
        b"!!int ",
    ),
]
"""Pieces of files; random ones are put together."""
FOUND = {
    "a quoted line break": (".csv", b'prompt\n"a\nb"\n'),
    "an open quote": (".csv", b'prompt\na\n"b\nc\n'),
    "a stray quote": (".csv", b'prompt\n"a" b\n'),
    "an unquoted separator": (".csv", b"prompt\na, b\n"),
    "a mark": (".txt", b"\xef\xbb\xbfa\n"),
    "a line separator": (".jsonl", '{"prompt": "a\u2028b"}\n'.encode()),
    "null": (".json", b'{"a": null}'),
    "a name twice": (".json", b'{"a": "x", "a": "y"}'),
    "an octal name": (".yaml", b"0010: a\n"),
    "depth": (".json", b"[" * 99999),
    "half a character": (".json", rb'{"a": "\ud800"}'),
    "a NUL": (".txt", b"a\0b\n"),
    "nothing": (".txt", b"\n"),
}
"""Files that the readers of an earlier version misread, or failed on."""


def _read(path):
    readers._read.cache_clear()  # every example has the same path, often in the same millisecond
    return [(p.name, p.prompt) for p in read_prompts(read_by_suffix, path, "")]


def same_ends(text):
    return text.replace("\r\n", "\n").replace("\r", "\n")


def written(suffix, texts, ends):
    """A file as the format's own writer makes it, and the prompts that it holds."""
    if suffix == ".txt":
        texts = [" ".join(same_ends(text).split("\n")) for text in texts]
        return "".join(text + ends for text in texts), texts
    if suffix == ".jsonl":
        return "".join(json.dumps({"prompt": t}, ensure_ascii=False) + ends for t in texts), texts
    named = {str(number): text for number, text in enumerate(texts)}
    if suffix == ".json":
        return json.dumps(named, indent=1, ensure_ascii=False).replace("\n", ends), texts
    if suffix == ".yaml":
        text = yaml.safe_dump(named, allow_unicode=True)  # the dumper turns U+0085 into a blank
        return text.replace("\n", ends), list(yaml.load(text, yaml.BaseLoader).values())
    out = io.StringIO(newline="")
    delimiter = "\t" if suffix == ".tsv" else ","
    writer = csv.writer(out, delimiter=delimiter, lineterminator=ends, quoting=csv.QUOTE_ALL)
    writer.writerows([["prompt", "n"], *([text, "x"] for text in texts)])
    return out.getvalue(), [same_ends(text) for text in texts]


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=200)
@given(
    texts=TEXTS, encoding=st.sampled_from(list(MARKS)), ends=st.sampled_from(["\n", "\r\n", "\r"])
)
def test_what_is_written_is_read(attempt, tmp_path_factory, suffix, texts, encoding, ends):
    text, wanted = written(suffix, texts, ends)
    path = tmp_path_factory.getbasetemp() / f"written{suffix}"
    path.write_bytes(MARKS[encoding] + text.encode(encoding))
    found = attempt(lambda: _read(path))
    assert found is not REFUSED and [prompt for _, prompt in found] == wanted


def decoded(data):
    """The text as Python's own codecs and text files read it."""
    encoding = "utf-8-sig"
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-32" if data.startswith(b"\xff\xfe\0\0") else "utf-16"
    elif data.startswith(b"\0\0\xfe\xff"):
        encoding = "utf-32"
    return io.TextIOWrapper(io.BytesIO(data), encoding=encoding).read()


def rfc4180(text, delimiter):
    """The rows of RFC 4180, character by character."""
    rows, row, field, quoted, place = [], [], "", False, 0
    while place < len(text):
        character = text[place]
        if quoted:
            if character == '"' and text[place + 1 : place + 2] == '"':
                field, place = field + '"', place + 1
            elif character == '"':
                quoted = False
            else:
                field += character
        elif character == '"' and not field:
            quoted = True
        elif character == delimiter:
            row, field = [*row, field], ""
        elif character == "\n":
            rows, row, field = [*rows, [*row, field]], [], ""
        else:
            field += character
        place += 1
    return [*rows, [*row, field]]


def independent(suffix, data):
    text = decoded(data)
    if suffix in (".csv", ".tsv"):
        for delimiter in ",;\t" if suffix == ".csv" else "\t,;":
            header, *rows = rfc4180(text, delimiter)
            if places := [i for i, name in enumerate(header) if name.strip() in COLUMNS]:
                kept = [row for row in rows if any(map(str.strip, row))]
                return [row[places[0]] for row in kept]
    if suffix == ".txt":
        return [line for line in text.split("\n") if line.strip()]
    if suffix == ".jsonl":
        return [json.loads(line)["prompt"] for line in text.split("\n") if line.strip()]
    if suffix == ".json":
        return [(name, json.loads(text)[name]) for name in json.loads(text)]
    return list(yaml.load(text, yaml.BaseLoader).items())


def check(attempt, path, suffix, data):
    path.write_bytes(data)
    found = attempt(lambda: _read(path))
    if found is not REFUSED:
        named = suffix in (".json", ".yaml")
        assert (found if named else [text for _, text in found]) == independent(suffix, data)
        assert all(Prompt(*pair).prompt.strip() for pair in found)


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=600)
@given(pieces=st.lists(st.sampled_from(FRAGMENTS) | st.binary(max_size=2), max_size=14))
@example(pieces=[])
def test_whatever_is_read_is_in_the_file(attempt, tmp_path_factory, suffix, pieces):
    path = tmp_path_factory.getbasetemp() / f"pieces{suffix}"
    check(attempt, path, suffix, b"".join(pieces))


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@settings(max_examples=600)
@given(pieces=st.lists(st.sampled_from(FRAGMENTS), max_size=14))
def test_whatever_is_read_below_a_header_is_in_the_table(attempt, tmp_path_factory, suffix, pieces):
    path = tmp_path_factory.getbasetemp() / f"table{suffix}"
    check(attempt, path, suffix, b"prompt,x\n" + b"".join(pieces))


@pytest.mark.parametrize("case", FOUND)
def test_what_was_misread_once_is_not_misread_again(attempt, tmp_path, case):
    suffix, data = FOUND[case]
    check(attempt, tmp_path / f"list{suffix}", suffix, data)
