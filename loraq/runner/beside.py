"""Records beside which a scored pipeline is put: their 16-bit images, and one table of all."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loraq.errors import LoraqError
from loraq.metrics.common.image_set import ImageSet
from loraq.metrics.common.kinds import SETS
from loraq.results.committed import RECORDS, read_results
from loraq.results.experiment_folder import ROWS_FILE, read_experiment
from loraq.results.record import Record
from loraq.results.tables.columns import kind_of, unit_of
from loraq.results.tables.tables import load_records, main_table, paired_table
from loraq.results.tables.text import to_markdown
from loraq.runner.store import Store
from loraq.utils.kinds import SUFFIXES

_SETTINGS = {
    "model": ("height", "width", "steps", "guidance", "max_sequence_length", "call"),
    "data": ("set", "captions", "split", "count"),
    "generate": ("seed",),
}
"""What two rows have in common if their images are compared one by one."""


def read_beside(paths: Sequence[str | os.PathLike[str]]) -> tuple[list[Record], str | None]:
    """The records at `paths`, and the row that tables compare with; LoraqError for equal names.

    paths: of a record each, or of an experiment: results/NAME of a checkout, OUTPUT/results/NAME.
    The baseline is that of the first experiment, else the first quantised row.
    """
    found: list[Record] = []
    baseline: str | None = None
    for path in (Path(path).resolve() for path in paths):
        if (path / RECORDS).is_dir():
            listed = read_results(path.name, path.parents[1])
            found, baseline = found + listed.records, baseline or listed.baseline
        elif (path / ROWS_FILE).is_file():
            rows, made = read_experiment(path.parents[1], path.name)
            found, baseline = found + made, baseline or rows["baseline"]
        else:
            found += load_records([path])
    names = [record.row for record in found]
    if double := next((name for name in names if names.count(name) > 1), None):
        raise LoraqError(
            f"--beside: {names.count(double)} records are named '{double}'. Leave one out, or "
            "score it again with another --name."
        )
    quantized = [record.row for record in found if record.config.get("method") != "reference"]
    return found, baseline or next(iter(quantized or names), None)


def sixteen_bit(found: Sequence[Record]) -> Record | None:
    """The record of the 16-bit row among them."""
    return next((record for record in found if record.config.get("method") == "reference"), None)


def images_of(record: Record, store: Store) -> Path:
    """The folder of the images that a record was measured on; LoraqError if there is none."""
    suffix = SUFFIXES[kind_of(record)]
    files = [f"{name}{suffix}" for name in record.images.get("names", ())]
    for folder in sorted((store.root / "images").glob("*/")):
        complete = files and all((folder / file).is_file() for file in files)
        if complete and _hash_of(folder, record) == record.images["hash"]:
            return folder
    experiment = record.experiment
    raise LoraqError(
        f"The images of row '{record.row}' of {experiment} are not in {store.root}/images. Make "
        f"them (loraq run experiment={experiment} row={record.row}), set output=FOLDER to where "
        "they are, or give their folder: --against FOLDER."
    )


def _hash_of(folder: Path, record: Record) -> str:
    return SETS[kind_of(record)].of_folder(folder, record.images["names"]).hash


def check_same_settings(config: Mapping[str, Any], found: Sequence[Record]) -> None:
    """LoraqError if a record was made with other prompts, seeds or settings of the sampler.

    config: that of the scored row, as a record holds it. Rows without a model are images of
    another program: of them only names are compared.
    """
    for record in found:
        for part, names in _SETTINGS.items():
            own, other = config.get(part, {}), record.config.get(part, {})
            for name in names:
                if name in own and name in other and _plain(own[name]) != _plain(other[name]):
                    raise LoraqError(
                        f"--beside: row '{record.row}' was made with "
                        f"{part}.{name}={other[name]}, this one with {own[name]}. Set "
                        f"{part}.{name} to that value, or leave the row out."
                    )


def check_same_names(names: Sequence[str], found: Sequence[Record]) -> None:
    """LoraqError if a record is of other images than `names`, in order: rows are not paired."""
    for record in found:
        other = record.images.get("names", [])
        if list(names) != other:
            raise LoraqError(
                f"--beside: row '{record.row}' has {len(other)} {unit_of(record)}, and this one "
                f"{len(names)}, or others. Select the same with data.split= and data.count=, or "
                "leave the row out."
            )


def check_same_images(reference: ImageSet, original: Record, folder: Path) -> None:
    """LoraqError unless the reference is the images of the 16-bit row that others refer to."""
    if reference.hash != original.images["hash"]:
        raise LoraqError(
            f"--against: '{folder}' has other images than the 16-bit row '{original.row}' of "
            "--beside, to which the rows there are compared. Leave --against out, or leave out "
            "--beside."
        )


def _plain(value: Any) -> Any:
    """A value without the folders of a path, which a record does not keep either."""
    return Path(value).name if isinstance(value, str) and "/" in value else value


def beside_text(own: Record, paths: Sequence[str | os.PathLike[str]]) -> str:
    """The rows at `paths` and the scored one in one table, and their paired differences."""
    found, baseline = read_beside(paths)
    rows = [*found, own]
    text = to_markdown(main_table(rows, baseline))
    return f"{text}\n\n{to_markdown(paired_table(rows, baseline))}" if baseline else text
