"""Report pages of committed records for the browser: one with generated images, two without."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from loraq.results import committed
from loraq.results.experiment_folder import ROWS_FILE
from loraq.results.record import save_record
from loraq.results.report import write_report
from loraq.utils.files import write_json
from tests.damage import certify

WITH_IMAGES = "demo"
NAMES = (WITH_IMAGES, "table1", "ablation_error_source")
SIDE = 128


def write_pages(folder: Path) -> dict[str, Path]:
    """Return name → page; only the first is from a run with images."""
    make_run(WITH_IMAGES, folder)
    pages = {}
    for name in NAMES:
        pages[name] = write_report(folder / "results" / name, folder / f"{name}.html")
    return pages


def make_run(name: str, output: Path) -> None:
    """Write committed records as a run, with one picture per prompt and a noisy copy per row."""
    found = committed.read_results(name)
    rows = []
    for number, record in enumerate(found.records):
        certify(save_record(record, output / "record" / record.key / "record.json"))
        rows.append({"row": record.row, "record": record.key, "images": record.key})
        folder = output / "images" / record.key
        folder.mkdir(parents=True)
        for place, prompt in enumerate(record.images["names"]):
            generator = np.random.default_rng(place)
            low = Image.fromarray(generator.integers(0, 255, (5, 5, 3), dtype=np.uint8))
            smooth = np.asarray(low.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=int)
            noise = np.random.default_rng((place, number)).normal(0, 3 * number, smooth.shape)
            pixels = np.clip(smooth + noise.round().astype(int), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{prompt}.png")
        certify(folder / "manifest.json")
    (output / "results" / name).mkdir(parents=True)
    write_json(output / "results" / name / ROWS_FILE, {"baseline": found.baseline, "rows": rows})
