"""Names of rows are names of files everywhere, labels are one line; wrong files are answered."""

from __future__ import annotations

import re
import shutil

import pytest

from loraq import compose
from loraq.compose import CONF, load_rows
from loraq.config import Config
from loraq.errors import LoraqError
from loraq.utils.names import LONGEST, check_label
from tests import published

LOCAL = ["model.hub_id=null", f"model.path={published.FOLDER / 'wan_2_2_ti2v_5b'}"]
BASE = load_rows(["method=rtn"])[1]
GOOD = ("rtn", "RTN 2", "w4a8+gptq", "a.b-c_d", "größer", "x" * LONGEST)
BAD = (
    "", " ", ".", "..", "../../x", "/abs", "a/b", "a\\b", "c:x", "a\nb", "a\0b", "a\tb", "\u202eb",
    "con", "NUL.txt", "com1", "trailing.", "trailing ", " leading", ".hidden", "~home",
    "a*b", "a?b",
    'a"b', "a<b", "a|b", "x" * (LONGEST + 1), "ü" * LONGEST,
)  # fmt: skip


@pytest.mark.parametrize("setting", ["row", "method", "experiment"])
def test_a_name_that_is_no_file_name_is_refused(setting):
    for name in GOOD:
        assert getattr(Config(**{**vars(BASE), setting: name}), setting) == name
    for name in BAD:
        with pytest.raises(LoraqError, match=setting):
            Config(**{**vars(BASE), setting: name})


def test_a_label_is_one_line_of_text():
    for label in ("A & B", "100 % <b>", 'W4A8, "best"', "ᵃ → $x$"):
        check_label("label", label)
    for label in ("a\nb", "a\rb", "a\u2028b", "a\0", "  ", "", "x" * (LONGEST + 1)):
        with pytest.raises(LoraqError, match="label="):
            Config(**{**vars(BASE), "label": label})


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Writes conf/experiment/mine.yaml in a copy of conf/."""
    folder = shutil.copytree(CONF.resolve(), tmp_path / "conf")
    monkeypatch.setattr(compose, "CONF", folder)

    def write(text: str | bytes, name: str = "experiment/mine"):
        data = text if isinstance(text, bytes) else text.encode()
        (folder / f"{name}.yaml").write_bytes(data)

    return write


def test_arguments_of_the_call_are_set_in_a_model_that_has_them_and_added_to_others():
    """Their names differ from model to model; the default model's are no limit."""
    video = "model=wan_2_2_ti2v_5b"
    for given in ("model.call.num_frames=9", "++model.call.num_frames=9"):
        assert load_rows([video, given, *LOCAL])[-1].model.call["num_frames"] == 9
    for given in ("model.call.num_frames=9", "model.dtypes.vae=float32"):
        with pytest.raises(LoraqError, match=re.escape(f"+{given}")):
            load_rows(["model=tiny_pixart", given])


def rows(text: str) -> str:
    return f"# @package _global_\nexperiment: mine\nrows:\n{text}\n"


def test_rows_of_a_file_compose(file):
    file(rows("  - {name: a, label: A, overrides: [method=rtn]}\n  - {name: b, label: B}"))
    assert [row.row for row in load_rows(["experiment=mine"])] == ["reference", "a", "b"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (rows("  - {name: ../../x, label: A}"), ["rows[1].name='../../x'", "'/'"]),
        (rows('  - {name: a, label: "A\\n% B"}'), ["rows[1].label", "one line"]),
        (rows("  - {name: a, label: A}\n  - {name: A, label: B}"), ["'a' and 'A'", "capitals"]),
        (rows("  - {name: a, label: A}\n  - {name: a, label: B}"), ["'a' and 'a'", "Rename"]),
        (rows("  - {nmae: a, label: A}"), ["rows[1].nmae", "Did you mean name"]),
        (rows("  - {name: a, label: A}\nbaseline: b"),
         ["Unknown baseline", "'b'", "Known: a, reference"]),
        (rows("  - {name: a}"), ["rows[1]", "label must be given"]),
        (rows("  - {name: 3, label: A}"), ["rows[1].name=3", "text"]),
        (rows("  - {name: a, label: A, overrides: method=rtn}"), ["rows[1].overrides", "list"]),
        (rows("  - {name: a, label: A, overrides: [3]}"), ["rows[1].overrides=3", "text"]),
        (rows("  - just text"), ["rows[1]='just text'", "group of settings"]),
        (rows("  3"), ["rows=3", "must be a list"]),
        (rows("  a: b"), ["rows={'a': 'b'}", "must be a list"]),
        (rows("  []"), ["rows=[]", "must be a list"]),
        ("# @package _global_\nrows: [\n", ["cannot be composed", "mine"]),
        ("# @package _global_\na: b: c\n", ["cannot be composed", "mine"]),
        ("# @package _global_\n\ta: b\n", ["cannot be composed", "mine"]),
        ("- a\n- b\n", ["experiment=mine", "# @package _global_"]),
        ("just text\n", ["experiment=mine", "# @package _global_"]),
        (b"\xff\xfe\x00", ["cannot be composed", "mine"]),
        ("# @package _global_\ndefaults: 3\n", ["cannot be composed", "mine"]),
        ("# @package _global_\ndefaults: [override /method: nope]\n", ["nope"]),
        ("# @package _global_\nquant: [1]\n", ["cannot be composed", "mine"]),
        ("# @package _global_\nquant: {branch: 3}\n", ["quant.branch=3"]),
        ("# @package _global_\ndata: {count: '${oc.env:NOT_SET}'}\n", ["'NOT_SET'"]),
    ],
)  # fmt: skip
def test_a_file_of_ones_own_that_is_wrong_is_answered_in_words(file, text, words):
    file(text)
    with pytest.raises(LoraqError) as caught:
        load_rows(["experiment=mine"])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("+rows=[{name: a}]", ["conf/experiment/NAME.yaml"]),
        ("hydra=3", ["hydra=3", "no effect", "loraq sweep"]),
        ("hydra.verbose=true", ["hydra.verbose=true", "no effect"]),
        ("+hydra.nope=1", ["+hydra.nope=1", "no effect"]),
        ("model.call=3", ["model.call=3"]),
        ("model.path=${nope}", ["nope"]),
        ("label='a\nb'", ["label", "one line"]),
    ],
)
def test_an_override_that_is_wrong_is_answered_in_words(override, words):
    with pytest.raises(LoraqError) as caught:
        load_rows(["method=rtn", override])
    for word in words:
        assert word in str(caught.value)


def test_rows_are_composed_once_each(monkeypatch):
    """And parsed with one list of settings, whatever the number of rows."""
    from loraq.config.composition import Composer

    composed = []
    merge = Composer.merge

    def counted(self, entries):
        composed.append(len(entries))
        return merge(self, entries)

    monkeypatch.setattr(Composer, "merge", counted)
    assert len(load_rows(["experiment=table1"])) == 26
    assert len(composed) == 26 + 2  # the experiment's file, and the list of settings
