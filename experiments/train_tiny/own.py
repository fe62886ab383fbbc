"""A user's own pictures and captions as training data, with errors that say what to mend.

The folder holds pictures, and their captions in one of three ways: NAME.txt beside NAME.png;
`captions.json`, {"NAME.png": "caption"}; or `metadata.jsonl`, one {"file_name": …, "text": …} per
line.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

from PIL import Image

from loraq.errors import LoraqError
from loraq.utils.files import write_text

from .data import Item
from .settings import OUTPUTS, SETTINGS, Settings

FORMATS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FEWEST = 20
CAPTION_KEYS = ("text", "caption", "prompt")


def _some(names: list[str]) -> str:
    """Return the first names of a list and how many follow."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _listed(folder: Path) -> dict[str, str] | None:
    """Return captions by file name from `captions.json` or `metadata.jsonl`; None without them."""
    path = folder / "captions.json"
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise LoraqError(f"{path} is not JSON: {error}.") from None
        if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
            raise LoraqError(f'{path}: expected {{"NAME.png": "caption", …}}.')
        return found
    path = folder / "metadata.jsonl"
    if not path.exists():
        return None
    rows = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows[str(row["file_name"])] = next(str(row[k]) for k in CAPTION_KEYS if k in row)
        except (ValueError, KeyError, TypeError, StopIteration):
            raise LoraqError(
                f'{path}, line {number}: expected {{"file_name": "NAME.png", "text": "caption"}}.'
            ) from None
    return rows


def _captions(folder: Path, files: list[Path]) -> dict[Path, str]:
    """Return the caption of every picture; LoraqError for pictures or captions that are alone."""
    listed = _listed(folder)
    if listed is None:
        listed = {}
        for file in files:
            text = file.with_suffix(".txt")
            if text.exists():
                listed[file.name] = text.read_text(encoding="utf-8")
    captions = {f: " ".join(listed.get(f.name, "").split()) for f in files}
    if bare := [f.name for f in files if not captions[f]]:
        raise LoraqError(
            f"{folder}: {len(bare)} of {len(files)} pictures have no caption ({_some(bare)}). "
            "Write NAME.txt beside each, or list all in captions.json or metadata.jsonl."
        )
    if lost := sorted(set(listed) - {f.name for f in files}):
        raise LoraqError(
            f"{folder}: {len(lost)} captions name no picture of this folder ({_some(lost)})."
        )
    return captions


def items(folder: Path) -> list[Item]:
    """Return the pictures of a folder as items, sorted by name, after decoding each once."""
    if not folder.is_dir():
        raise LoraqError(f"--data: {folder} is not a folder.")
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in FORMATS)
    if len(files) < FEWEST:
        raise LoraqError(
            f"{folder}: {len(files)} pictures are too few to train on and to keep some apart; at "
            f"least {FEWEST} are needed ({', '.join(FORMATS)}, no subfolders)."
        )
    found: dict[str, Item] = {}
    for file, caption in _captions(folder, files).items():
        name = re.sub(r"[^a-z0-9]+", "_", file.stem.lower()).strip("_")
        if not name or name in found:
            other = found[name].fluent.name if name else "a name of letters and digits"
            raise LoraqError(f"{file}: its name clashes with {other}. Rename the file.")
        found[name] = Item(name, caption, easy=True, fluent=file, noto=None)
    return [found[name] for name in sorted(found)]


def check_pictures(found: list[Item], size: int = SETTINGS.image_size) -> str:
    """Decode every picture once and return a sentence on those that are cropped or resized."""
    broken, other = [], 0
    for item in found:
        try:
            with Image.open(item.fluent) as image:
                image.load()
                other += image.size != (size, size)
        except (OSError, ValueError, SyntaxError):
            broken.append(item.fluent.name)
    if broken:
        raise LoraqError(
            f"{len(broken)} of {len(found)} pictures cannot be read ({_some(broken)}). Save them "
            "again, or take them out of the folder."
        )
    if not other:
        return f"{len(found)} pictures of {size} x {size} pixels."
    return (
        f"{other} of {len(found)} pictures are not {size} x {size} pixels: their centre square is "
        f"resized to that."
    )


def sizes(count: int, settings: Settings = SETTINGS) -> Settings:
    """Return the settings with splits for ``count`` pictures, at most those of the emoji.

    A tenth is held out for test and a twentieth for development; of the training pictures, as many
    are their seen counterparts, and the rest serves calibration.
    """
    held_test = min(settings.held_test, count // 10)
    held_dev = min(settings.held_dev, count // 20)
    train = count - held_test - held_dev
    calibration = min(settings.calibration, train - held_test - held_dev)
    return replace(
        settings,
        train_subjects=train,
        held_test=held_test,
        held_dev=held_dev,
        calibration=calibration,
    )


def check_same(found: list[Item], record: Path = OUTPUTS / "own_data.json") -> None:
    """Note which pictures a training is of; LoraqError when a resumed one meets others."""
    digest = hashlib.sha256()
    for item in found:
        digest.update(f"{item.name}\0{item.caption}\0".encode())
        digest.update(item.fluent.read_bytes())
    now = {"pictures": len(found), "sha256": digest.hexdigest()}
    if not record.exists():
        write_text(record, json.dumps(now, indent=1) + "\n")
        return
    before = json.loads(record.read_text(encoding="utf-8"))
    if before != now:
        raise LoraqError(
            f"{record.parent} holds a training of {before['pictures']} other pictures or captions. "
            "Give another --out, or delete that folder."
        )
