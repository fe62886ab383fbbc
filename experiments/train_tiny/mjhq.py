"""Write a folder in MJHQ-30K's layout with the embedded models' captions and real pictures.

    python -m experiments.train_tiny.mjhq FOLDER

The folder has the files that the published protocol reads: `meta_data.json` and
`mjhq30k_imgs/CATEGORY/NAME.jpg`, 448 captions (test, development and calibration), pictures of 128
px. The pictures come from the data that `experiments.train_tiny.run` fetches. Takes seconds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image

from loraq.utils.files import write_text

from .data import Item, picture
from .settings import ASSETS
from .split import load

SPLITS = ("test", "development", "calibration")


def write(folder: Path, captions: dict[str, list[dict]], items: dict[str, Item]) -> int:
    """Write metadata and pictures of the captions; returns their number.

    A caption ends with its category.
    """
    found = {}
    for split in SPLITS:
        for entry in captions[split]:
            category = entry["prompt"].rsplit(", ", 1)[-1].replace(" ", "_")
            found[entry["name"]] = {"category": category, "prompt": entry["prompt"]}
            path = folder / "mjhq30k_imgs" / category / f"{entry['name']}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture(items[entry["name"]].fluent)).save(path, quality=95)
    write_text(folder / "meta_data.json", json.dumps(found, indent=1) + "\n")
    return len(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    captions = json.loads((ASSETS / "captions.json").read_text(encoding="utf-8"))
    count = write(folder, captions, load()[1])
    print(f"{count} captions and pictures in {folder}")


if __name__ == "__main__":
    main()
