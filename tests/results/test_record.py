"""Records: round trip, atomic writing, non-finite numbers, invalid values and schemas."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import subprocess
from pathlib import Path

import numpy as np
import pytest

from loraq.errors import LoraqError
from loraq.metrics.common.intervals import mean_interval
from loraq.results import record as records
from loraq.results.committed import read_results
from loraq.results.experiment_folder import rewrite_tables
from loraq.results.record import Record
from loraq.utils.plain import to_plain


def example(**changes) -> Record:
    fields = {
        "key": "0123456789abcdef",
        "experiment": "demo",
        "row": "loraq_o2",
        "label": "LoRaQ O2, ø 8-bit",
        "config": {"quant": {"skip": ("cross_k",), "branch": {"rank": None, "budget": 0.64}}},
        "model_hash": "ab" * 32,
        "budget": {
            "bits_per_weight": 4.89,
            "branch_bits_per_weight": 0.64,
            "nbytes": 123,
            "rank": 19,
        },
        "layers": [{"layer": "a", "role": "ff_up", "weight_error": 0.1, "output_error": 0.05}],
        "images": {"hash": "cd", "names": ["x", "y"], "seen": [True, False]},
        "metrics": {"psnr": {"value": 30.5, "per_image": [math.inf, 30.5], "n": 2}},
        "timings": {"generate": 1.5},
        **records.provenance(),
    }
    return Record(**{**fields, **changes})


def test_round_trip(tmp_path: Path):
    path = records.save_record(example(), tmp_path / "records" / "row.json")
    loaded = records.load_record(path)
    # tuples become lists
    assert loaded == example(config=to_plain(example().config), created=loaded.created)
    assert records.to_json(loaded) == path.read_text(encoding="utf-8")
    assert [file.name for file in path.parent.iterdir()] == ["row.json"]


def test_every_number_survives_exactly_and_non_finite_ones_are_explicit():
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, math.inf, -math.inf, math.nan]
    names = {"names": list(map(str, values))}
    text = records.to_json(example(images=names, metrics={"m": {"n": 8, "per_image": values}}))
    json.loads(text, parse_constant=lambda word: pytest.fail(f"bare {word} in the JSON"))
    back = records.from_json(text).metrics["m"]["per_image"]
    assert list(map(repr, back)) == list(map(repr, values))
    # the string "nan" stays a string
    assert records.from_json(records.to_json(example(row="nan"))).row == "nan"


def test_numpy_and_torch_scalars_become_plain_numbers():
    torch = pytest.importorskip("torch")
    given = {"a": np.float32(0.5), "b": np.int64(3), "c": torch.tensor(2.0), "d": np.bool_(True)}
    plain = to_plain(given)
    assert plain == {"a": 0.5, "b": 3, "c": 2.0, "d": True}
    assert [type(value) for value in plain.values()] == [float, int, float, bool]


def test_values_that_json_cannot_represent_raise_with_their_place():
    with pytest.raises(LoraqError, match=r"record\.metrics\.psnr\.per_image: a ndarray"):
        records.to_json(example(metrics={"psnr": {"per_image": np.zeros(3)}}))
    with pytest.raises(LoraqError, match="key 3 is not a string"):
        records.to_json(example(config={3: "x"}))


def test_a_killed_or_failed_write_leaves_the_old_record(tmp_path: Path, monkeypatch):
    path = records.save_record(example(), tmp_path / "row.json")
    before = path.read_bytes()

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("loraq.utils.files.os.fsync", full)
    with pytest.raises(LoraqError, match="Disk full"):
        records.save_record(example(label="new"), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_reading_errors_name_the_file_and_the_remedy(tmp_path: Path):
    with pytest.raises(LoraqError, match=r"No record at .*none\.json"):
        records.load_record(tmp_path / "none.json")
    damaged = tmp_path / "damaged.json"
    for text, words in (
        (records.to_json(example())[:-40], "damaged.json"),
        ("[]", "not a LoRaQ record"),
        (records.to_json(example(schema=99)), "schema 99, but this version reads 1"),
        (records.to_json(example()).replace('"row"', '"raw"'), "unknown fields .*raw"),
    ):
        damaged.write_text(text, encoding="utf-8")
        with pytest.raises(LoraqError, match=words):
            records.load_record(damaged)


def replaced(value, *place):
    """The JSON of a record in which one value is replaced."""
    plain = json.loads(records.to_json(example()))
    target = plain
    for name in place[:-1]:
        target = target[name]
    target[place[-1]] = value
    return json.dumps(plain)


DAMAGED = {
    "a metric in words": (replaced("30", "metrics", "psnr", "value"), 'value is "30", not a numb'),
    "a number too large": (replaced(10**400, "metrics", "psnr", "value"), "value is 1000.*, not a"),
    "a list of metrics": (replaced([], "metrics"), r"metrics is \[\], not an object"),
    "bytes that are no number": (replaced(True, "budget", "nbytes"), "nbytes is true, not a whole"),
    "a layer without role": (replaced([{"layer": "a"}], "layers"), r"layers\[0\]: .*'role' is mis"),
    "a name that is a number": (
        replaced([1, "y"], "images", "names"),
        r"names\[0\] is 1, not text",
    ),
    "more names than values": (replaced(list("xyz"), "images", "names"), "2 values for 3 images"),
    "a split without its size": (
        replaced({"value": 1.0, "lo": 0.0, "hi": 2.0}, "metrics", "psnr", "seen"),
        "seen: the entry 'n' is missing",
    ),
    "limits without one": (replaced({"limits": {"gaussian": 1}}, "analyses"), "'shannon' is miss"),
    "half a character": (replaced("\ud800", "label"), "surrogates not allowed"),
    "a field twice": (records.to_json(example()).replace('"row"', '"key"'), "'key' occurs twice"),
    "NaN": (records.to_json(example()).replace("30.5", "NaN", 1), "NaN is not a value of JSON"),
    "bytes": (b"\xff\xfe", "can't decode byte"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_record_is_refused_before_a_table_reads_it(tmp_path, case):
    text, words = DAMAGED[case]
    path = tmp_path / "row.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(LoraqError, match=rf"Cannot read the record .*row\.json: .*{words}"):
        records.load_record(path)
    with pytest.raises(LoraqError, match="Cannot read the record"):
        records.load_record(tmp_path)


ROWS = {
    "no JSON": '{"rows": [',
    "no rows": '{"baseline": null, "rows": []}',
    "no baseline": '{"rows": [{"row": "a", "record": "x"}]}',
    "no record": '{"baseline": null, "rows": [{"row": "a"}]}',
    "a row twice": '{"baseline": null, "rows": [{"row": "a", "record": "x"}, '
    '{"row": "a", "record": "y"}]}',
    "a list": "[]",
}


@pytest.mark.parametrize("case", ROWS)
def test_a_damaged_list_of_rows_is_refused(tmp_path, case):
    folder = tmp_path / "results" / "demo"
    folder.mkdir(parents=True)
    (folder / "rows.json").write_text(ROWS[case])
    for read in (lambda: read_results("demo", tmp_path), lambda: rewrite_tables(tmp_path, [])):
        with pytest.raises(LoraqError, match=r"rows\.json'.*run the experiment again"):
            read()


def test_comparable_leaves_out_only_what_may_differ():
    later = dataclasses.replace(example(), created="later", timings={"generate": 9.0}, machine={})
    assert later != example() and later.comparable() == example().comparable()
    other = dataclasses.replace(example(), metrics={})
    assert other.comparable() != example().comparable()


def test_origin_names_no_machine():
    import platform

    origin = records.provenance()
    assert platform.node() not in json.dumps(to_plain(origin)).split('"')
    assert origin["versions"]["loraq"] and origin["machine"]["cpus"] >= 1
    assert origin["machine"]["model"]


@pytest.mark.parametrize(
    ("changed", "dirty"),
    [("loraq/results/record.py", True), ("conf/method/rtn.yaml", True), ("README.md", False)],
)
def test_a_commit_is_marked_if_code_or_configuration_has_changes(
    tmp_path: Path, monkeypatch, changed: str, dirty: bool
):
    def git(*command: str) -> None:
        who = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
        subprocess.run(["git", *who, *command], cwd=tmp_path, check=True, capture_output=True)

    for file in ("loraq/results/record.py", "conf/method/rtn.yaml", "README.md"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("first", encoding="utf-8")
    (tmp_path / "loraq" / "conf").symlink_to("../conf")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "first")
    monkeypatch.setattr(records, "PACKAGE", tmp_path / "loraq")
    monkeypatch.setattr(records, "CONF", tmp_path / "loraq" / "conf")
    clean = records.checkout_commit()
    assert len(clean) == 12 and not clean.endswith("+")
    (tmp_path / changed).write_text("second", encoding="utf-8")
    assert records.checkout_commit() == clean + ("+" if dirty else "")
    git("checkout", "-q", ".")
    (tmp_path / changed).with_name(f"new_{Path(changed).name}").write_text("", encoding="utf-8")
    assert records.checkout_commit() == clean + ("+" if dirty else "")


def test_reading_replaces_intervals_of_another_method():
    """An earlier version stored percentile bootstrap intervals, and KID's at every N."""
    values = [*np.random.default_rng(0).exponential(size=32)]
    stored = {"value": float(np.mean(values)), "lo": 0.1, "hi": 0.2, "n": 32, "reason": ""}
    few = {"value": 0.5, "lo": 0.4, "hi": 0.6, "n": 4, "reason": ""}
    psnr = {**stored, "per_image": values, "seen": few | {"n": 28}, "held_out": few}
    kid = {**stored, "per_image": None, "seen": few | {"n": 16}}
    seen = [number >= 4 for number in range(32)]
    images = {"names": [f"{number}" for number in range(32)], "seen": seen}
    old = example(metrics={"psnr": psnr, "kid": kid}, images=images)
    read = records.from_json(records.to_json(old)).metrics
    _, lo, hi = mean_interval(values)
    assert (
        read["psnr"] | {"lo": 0.1, "hi": 0.2} | {p: psnr[p] for p in ("seen", "held_out")} == psnr
    )
    assert (read["psnr"]["lo"], read["psnr"]["hi"]) == (lo, hi)
    assert (read["psnr"]["seen"]["lo"], read["psnr"]["seen"]["hi"]) == mean_interval(values[4:])[1:]
    assert read["psnr"]["held_out"]["lo"] is None and "N < 8" in read["psnr"]["held_out"]["reason"]
    assert (read["kid"]["lo"], read["kid"]["hi"]) == (0.1, 0.2)  # from features: not in the record
    assert read["kid"]["seen"]["lo"] is None and "N < 32" in read["kid"]["seen"]["reason"]
    assert records.from_json(records.to_json(old)) == records.from_json(
        records.to_json(records.from_json(records.to_json(old)))
    )
