"""A published set through the whole flow: the command of full size, on a folder in its layout."""

from __future__ import annotations

from loraq.runner.experiment import run
from tests.data.layouts import mjhq_folder


def test_mjhqs_layout_goes_from_its_folder_to_the_table(overrides, tmp_path):
    folder = mjhq_folder(tmp_path / "MJHQ-30K", 30)
    own = ("data.captions=", "data.count=", "data.real=", "metrics.names=")
    kept = [override for override in overrides if not override.startswith(own)]
    asked = [
        "method=rtn",
        "data=mjhq",
        f"data.captions={folder}",
        "data.count=6",
        "metrics.names=[psnr,frechet,kid]",
        "metrics.extractor=efflite0",
        *kept,
    ]
    outcome = run(asked, progress=False)
    reference, row = outcome.records
    names = row.images["names"]
    assert len(names) == 6 and names == sorted(names) == reference.images["names"]
    assert row.metrics["fd_efflite0"]["value"] > 0 and row.metrics["psnr"]["n"] == 6
    kept = list((tmp_path / "outputs" / "features").glob("*/manifest.json"))
    assert len(kept) == 1  # for both rows
    again = run(asked, progress=False)
    assert [r.created for r in again.records] == [r.created for r in outcome.records]
    # other real images under the same names are measured anew, without new generated ones
    picture = next(folder.rglob(f"{names[0]}.jpg"))
    picture.write_bytes(next(folder.rglob(f"{names[1]}.jpg")).read_bytes())
    changed = run(asked, progress=False)
    assert changed.records[1].images == row.images
    values = [r.metrics["fd_efflite0"]["value"] for r in (row, changed.records[1])]
    assert values[0] != values[1]
