"""Little folders laid out as the publishers of prompt sets do, with pictures of one colour."""

from __future__ import annotations

import io
import json
import random
import tarfile
import zipfile
from pathlib import Path

from PIL import Image

CATEGORIES = ("animals", "food", "people")


def picture(name: str, side: int = 64) -> bytes:
    """A JPEG of one colour and a darker corner, which follow from the name."""
    draw = random.Random(name)
    image = Image.new("RGB", (side, side), tuple(draw.randrange(256) for _ in range(3)))
    image.paste((0, 0, 0), (0, 0, draw.randrange(8, side), draw.randrange(8, side)))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=95)
    return data.getvalue()


def names_of(count: int) -> list[str]:
    """Names in an order that is not theirs, as hashes are."""
    return [f"{random.Random(number).getrandbits(64):016x}" for number in range(count)]


def mjhq_files(count: int, padding: int = 0) -> dict[str, bytes]:
    """The two files of MJHQ-30K's repository; `padding` bytes make the archive a large one."""
    meta = {
        name: {"category": CATEGORIES[number % 3], "prompt": f"{CATEGORIES[number % 3]} {number}"}
        for number, name in enumerate(names_of(count))
    }
    pack = io.BytesIO()
    with zipfile.ZipFile(pack, "w") as archive:
        for name, entry in meta.items():
            archive.writestr(f"{entry['category']}/{name}.jpg", picture(name))
        archive.writestr("padding", random.Random(0).randbytes(padding))
    return {"meta_data.json": json.dumps(meta).encode(), "mjhq30k_imgs.zip": pack.getvalue()}


def sdci_files(count: int) -> dict[str, bytes]:
    """The two files of sDCI; all images lie in one folder of the archive."""
    names = [f"sa_{number}" for number in range(count)]
    text = "".join(f"{name}: 'a place, seen from number {name[3:]}'\n" for name in names)
    pack = io.BytesIO()
    with tarfile.open(fileobj=pack, mode="w:gz") as archive:
        for name in names:
            data = picture(name)
            entry = tarfile.TarInfo(f"sDCI/{name}.jpg")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return {"sDCI.yaml": text.encode(), "sDCI.gz": pack.getvalue()}


def mjhq_folder(folder: Path, count: int) -> Path:
    """MJHQ-30K's layout, unpacked by hand."""
    folder.mkdir(parents=True)
    files = mjhq_files(count)
    (folder / "meta_data.json").write_bytes(files["meta_data.json"])
    with zipfile.ZipFile(io.BytesIO(files["mjhq30k_imgs.zip"])) as archive:
        archive.extractall(folder / "mjhq30k_imgs")
    return folder
