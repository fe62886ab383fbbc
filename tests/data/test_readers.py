"""Prompts are what the file says, in every encoding and layout that editors write, or refused."""

from __future__ import annotations

import csv
import io
import json
import re

import pytest
import yaml

from loraq.config import DataConfig
from loraq.data import data_prompts
from loraq.errors import LoraqError
from loraq.utils.hashing import read_sha256sums

PROMPTS = [
    "a red cat",
    "café, 'au lait'",
    'a sign that says "two\nlines"',
    "one\u2028line\x85 \x0c",
]


def read(path, set="file"):
    return data_prompts(DataConfig(set=set, captions=str(path), count=None))


def texts(path, set="file"):
    return [prompt.prompt for prompt in read(path, set)]


def as_csv(delimiter):
    out = io.StringIO(newline="")
    rows = [["id", "Prompt", "note"], *([str(i), text, ""] for i, text in enumerate(PROMPTS))]
    csv.writer(out, delimiter=delimiter).writerows(rows)
    return out.getvalue()


MARKED = {
    "utf-8": b"",
    "utf-8-sig": b"",
    "utf-16-le": b"\xff\xfe",
    "utf-16-be": b"\xfe\xff",
    "utf-32-le": b"\xff\xfe\x00\x00",
    "utf-32-be": b"\x00\x00\xfe\xff",
}
WRITTEN = {
    "list.csv": as_csv(","),
    "semicolons.csv": as_csv(";"),
    "tabs.csv": as_csv("\t"),
    "LIST.TSV": as_csv("\t"),
    "list.jsonl": "".join(json.dumps({"prompt": p}, ensure_ascii=False) + "\n" for p in PROMPTS),
    "list.json": json.dumps(dict(enumerate(PROMPTS)), ensure_ascii=False),
    "list.yaml": yaml.dump(dict(enumerate(PROMPTS)), allow_unicode=True),
}


@pytest.mark.parametrize("encoding", MARKED)
@pytest.mark.parametrize("name", WRITTEN)
def test_every_encoding_and_line_end_gives_the_same_prompts(tmp_path, name, encoding):
    """As spreadsheets write: with a byte order mark, CRLF or CR, and empty lines at the end."""
    plain = WRITTEN[name].replace("\r\n", "\n")
    for number, ends in enumerate(("\n", "\r\n", "\r")):
        for rest in ("", "\n\n  \n"):
            path = tmp_path / f"{number}{len(rest)}{name}"
            text = (plain + rest).replace("\n", ends)
            path.write_bytes(MARKED[encoding] + text.encode(encoding))
            assert texts(path) == PROMPTS, (ends, rest)


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_lines_end_where_editors_end_them(tmp_path, ends):
    """Blanks at the end of a line belong to the prompt, on the last line as on the first."""
    wanted = ["a cat ", "one\u2028line\x85\x0b\x0c", "a dog "]
    path = tmp_path / "list.txt"
    path.write_bytes(("\ufeff" + ends.join([*wanted, "", " "])).encode())
    assert texts(path) == wanted


def test_a_spreadsheet_may_leave_out_empty_cells_and_add_empty_rows(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text(" prompt ,note,x\na cat\na dog,b\n,,\n,\n")
    assert texts(path) == ["a cat", "a dog"]


def test_partiprompts_holds_quotes_as_they_are(tmp_path):
    """Its publisher's file does not quote fields, and one prompt starts with a quotation mark."""
    wanted = ['"G I G" painted on a wall', 'the words "Fly" on a wall', '"all of it"']
    rows = "".join(f"{text}\tAbstract\tBasic\t\n" for text in wanted)
    (tmp_path / "PartiPrompts.tsv").write_text(f"Prompt\tCategory\tChallenge\tNote\n{rows}")
    assert texts(tmp_path, "parti") == wanted


def test_names_of_yaml_are_those_of_the_file(tmp_path):
    path = tmp_path / "list.yaml"
    path.write_text("0010: a\nyes: b\n1e3: c\n1.50: d\nnull: e\n? 2020-01-01\n: |-\n  f\n  g\n")
    found = {prompt.name: prompt.prompt for prompt in read(path)}
    names = {"0010": "a", "yes": "b", "1e3": "c", "1.50": "d", "null": "e", "2020-01-01": "f\ng"}
    assert found == names


REFUSED = {
    "Latin-1": ("list.txt", b"a cat\r\ncaf\xe9 au lait\r\n", r"line 2: the bytes e9 .* as UTF-8"),
    "UTF-16 without a mark": ("list.txt", "a\nb".encode("utf-16-le"), r"line 1: a NUL .* as UTF-8"),
    "half of a UTF-16 character": ("list.txt", b"\xff\xfea\x00\n\x00b", r"line 2: the bytes 62"),
    "a mark within": ("list.txt", b"a cat\n\xef\xbb\xbfa dog\n", "line 2: a byte order mark"),
    "nothing": ("list.txt", b" \n\n", "has no prompts"),
    "no rows": ("list.csv", b"prompt\n\n", "has no prompts"),
    "an empty object": ("list.json", b"{}", "has no prompts"),
    "an unquoted comma": ("list.csv", b"prompt\na\na cat, red\n", "line 3: 2 fields, but .* has 1"),
    "an open quote": ("list.csv", b'prompt\na\n"a cat\nb\n', "line 3: unexpected end of data"),
    "a stray quote": ("list.csv", b'prompt\n"a\nb"\n"a" cat\n', "line 4: .*expected after"),
    "a blank row": ("list.csv", b"prompt,x\na,1\n\nb,2\n", "line 3: the prompt is blank"),
    "a row without prompt": ("list.csv", b"x,prompt\n1,a\n2\n", "line 3: the prompt is blank"),
    "two columns": ("list.csv", b"prompt,Prompt\na,b\n", "2 columns could hold the prompts"),
    "one column twice": ("list.csv", b"prompt,prompt\na,b\n", "2 columns could hold the prompts"),
    "a number": ("list.json", b'{"a": "x", "b": 12}', "the prompt of 'b' is 12, not text"),
    "null": ("list.json", b'{"a": "x", "b": null}', "the prompt of 'b' is null, not text"),
    "a list": ("list.json", b'{"a": ["x"]}', r"the prompt of 'a' is \[\"x\"\], not text"),
    "twice in JSON": ("list.json", b'{"a": "x", "a": "y"}', "'a' occurs twice in one object"),
    "deep JSON": ("list.json", b"[" * 99999, "nested too deeply"),
    "half a character": ("list.json", rb'{"a": "\ud83d"}', "'a' contains NUL or half of a surr"),
    "a NUL in JSON": ("list.json", rb'{"a": "x\u0000"}', "'a' contains NUL"),
    "a number in YAML": ("list.yaml", b"a: x\nb: 12\n", "line 2: the prompt of 'b' is .*type int"),
    "a date in YAML": ("list.yaml", b"a: x\nb: 2020-01-01\n", "line 2: .*type timestamp"),
    "yes in YAML": ("list.yaml", b"a: x\nb: yes\n", "line 2: .*type bool"),
    "null in YAML": ("list.yaml", b"a: x\nb:\n", "line 2: .*type null, not text"),
    "a list in YAML": ("list.yaml", b"a: x\nb: [y]\n", "line 2: .*type seq, not text"),
    "twice in YAML": ("list.yaml", b"a: x\n'a': y\n", "names must be unique .*: a, a"),
    "two documents": ("list.yaml", b"a: x\n---\nb: y\n", "is not a prompt file"),
    "a list as name": ("list.yaml", b"? [a]\n: x\n", "line 1: a name is expected"),
    "a number in lines": ("list.jsonl", b'{"prompt": "a"}\n{"prompt": 3}', "line 2: .* is 3, not"),
    "no prompt in lines": ("list.jsonl", b'{"prompt": "a"}\n{"text": 3}', "line 2: KeyError"),
    "twice in lines": ("list.jsonl", b'{"prompt": "a", "prompt": "b"}', "line 1: .*occurs twice"),
    "names alike but for case": ("list.yaml", b"Cat: a\nb: c\ncat: b\n", "unique .*: Cat, cat"),
    "names alike but for accents": (
        "list.yaml",
        "caf\u00e9: a\ncafe\u0301: b\n".encode(),
        "names must be unique",
    ),
    "a line end in a name": ("list.json", rb'{"a\nb": "x"}', "contains a control character"),
    "a long name": ("list.json", json.dumps({"é" * 101: "x"}).encode(), "202 bytes, at most 200"),
    "a name of two half characters": ("list.json", rb'{"\udc00": "x"}', "control character"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_text_is_refused_with_its_place(tmp_path, case):
    name, data, words = REFUSED[case]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(LoraqError, match=f"(?s){re.escape(str(path))}.*{words}"):
        read(path)


CAPTIONS = {
    "a name that is a number": ('{"name": 3, "prompt": "x"}', "the name of entry 1 is 3, not text"),
    "a prompt that is null": ('{"name": "a", "prompt": null}', "prompt of 'a' is null, not text"),
    "seen in words": ('{"name": "a", "prompt": "x", "seen": "false"}', "'seen' of entry 1 is"),
    "no object": ('"a cat"', "is not a captions file"),
    "two prompts": ('{"name": "a", "prompt": "x", "prompt": "y"}', "'prompt' occurs twice"),
}


@pytest.mark.parametrize("case", CAPTIONS)
def test_captions_hold_text(tmp_path, case):
    entry, words = CAPTIONS[case]
    path = tmp_path / "captions.json"
    path.write_text(f'{{"test": [{entry}]}}')
    with pytest.raises(LoraqError, match=words):
        read(path, "captions")


PUBLISHED = {
    "mjhq": ("meta_data.json", {"a": {"category": "x", "prompt": 3}}),
    "coco": (
        "dataset_coco.json",
        {"images": [{"filename": "a.jpg", "split": "test", "sentences": []}]},
    ),
    "geneval": ("evaluation_metadata.jsonl", {"prompt": ["x"]}),
    "drawbench": ("drawbench.csv", {"Prompts": "x"}),
    "sdci": ("sDCI.yaml", {"a": 3}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_damaged_publication_is_refused(tmp_path, name):
    file, content = PUBLISHED[name]
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(LoraqError, match=re.escape(file)):
        read(tmp_path, name)


def test_a_folder_in_the_place_of_the_file_is_refused(tmp_path):
    (tmp_path / "prompts.txt").mkdir()
    with pytest.raises(LoraqError, match=r"prompts\.txt' is not a prompt file \(IsADirectory"):
        read(tmp_path)


def test_a_damaged_manifest_is_refused(tmp_path):
    (tmp_path / "meta_data.json").write_text('{"a": {"category": "x", "prompt": "y"}}')
    for text in ("[]", '{"files": {"x": 3}, "set": "mjhq", "unpacked": {}}', '{"files": {}'):
        (tmp_path / "loraq_manifest.json").write_text(text)
        with pytest.raises(LoraqError, match="Delete it and fetch again"):
            read(tmp_path, "mjhq")


def test_checksums_are_found_in_every_form_that_sha256sum_writes(tmp_path):
    (tmp_path / "SHA256SUMS").write_bytes(f"{'A' * 64}  ./x y\r\n{'b' * 64} *z\u2028\n\n".encode())
    assert read_sha256sums(tmp_path) == {"x y": "a" * 64, "z\u2028": "b" * 64}
    (tmp_path / "SHA256SUMS").write_text(f"{'a' * 64}  x\n{'b' * 63}  y\n")
    with pytest.raises(LoraqError, match="line 2 is not one of sha256sum"):
        read_sha256sums(tmp_path)
