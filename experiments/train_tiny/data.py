"""Named emoji images: list, selection of easy subjects, pixels on a white background.

An *item* is one named Fluent 3D emoji; its caption is ``"<name>, <group words>"``, for example
``"red apple, food fruit"``: the group words place a held-out name near related names.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from loraq.utils.files import replacing

from .settings import DATA, SETTINGS

GROUPS = {
    "Activities",
    "Animals & Nature",
    "Food & Drink",
    "Objects",
    "Smileys & Emotion",
    "Travel & Places",
}
# Clock faces and moon phases differ by a few pixels only; letters and signs show no subject.
DROPPED_NAME = re.compile(
    r"o.clock|thirty|moon|button|mailbox with|closed mailbox|open mailbox|globe showing"
    r"|emoji modifier"
)


@dataclass(frozen=True)
class Item:
    """One named emoji: its slug, caption and picture files (``noto`` may be missing)."""

    name: str
    caption: str
    easy: bool
    fluent: Path
    noto: Path | None


def _plain(codepoints: str) -> str:
    """Return code points without the variation selector, the key both packages share."""
    return "-".join(c for c in codepoints.lower().split("-") if c != "fe0f")


def _words(text: str) -> str:
    """Return a caption fragment in lower case with plain letters, digits and single spaces."""
    text = text.lower().replace("&", " and ").replace("’", "'")
    return re.sub(r"[^a-z0-9'!.]+", " ", text.replace("ñ", "n")).strip()


def items(data: Path = DATA) -> list[Item]:
    """Return all named Fluent 3D emoji without skin tones, sorted by slug."""
    fluent = {_plain(p.stem): p for p in sorted((data / "fluent/package/assets").glob("*.webp"))}
    noto_folder = data / "noto/package/img/google/64"
    noto = {_plain(p.stem): p for p in sorted(noto_folder.glob("*.png"))}
    source = json.loads((data / "noto/package/emoji.json").read_text(encoding="utf-8"))
    subgroup = {_plain(e["unified"]): e["subcategory"] for e in source}
    named = json.loads((data / "names/package/data-by-emoji.json").read_text(encoding="utf-8"))
    found: dict[str, Item] = {}
    for emoji, entry in named.items():
        key = _plain("-".join(f"{ord(c):04x}" for c in emoji))
        if key not in fluent or entry["slug"] in found:
            continue
        group = subgroup.get(key, entry["group"].lower())
        easy = entry["group"] in GROUPS and not DROPPED_NAME.search(entry["name"].lower())
        found[entry["slug"]] = Item(
            name=entry["slug"],
            caption=f"{_words(entry['name'])}, {_words(group)}",
            easy=easy,
            fluent=fluent[key],
            noto=noto.get(key),
        )
    return [found[slug] for slug in sorted(found)]


def picture(path: Path, size: int = SETTINGS.image_size) -> np.ndarray:
    """Return an RGBA file composited on white and resized with a box-like filter, uint8 [size,
    size, 3]."""
    image = Image.open(path).convert("RGBA")
    side = min(image.size)
    if image.size != (side, side):  # emoji are square; a user's picture may not be
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    flat = Image.alpha_composite(white, image).convert("RGB")
    return np.asarray(flat.resize((size, size), Image.Resampling.LANCZOS))


def pictures(files: list[Path], cache: Path) -> np.ndarray:
    """Return the pictures of all files, uint8 [n, size, size, 3], decoded once into an ``.npy``
    cache."""
    if cache.exists():
        stored = np.load(cache, mmap_mode="r")
        if len(stored) == len(files):
            return stored
    with replacing(cache) as temporary, open(temporary, "wb") as stream:
        np.save(stream, np.stack([picture(f) for f in files]))
    return np.load(cache, mmap_mode="r")
