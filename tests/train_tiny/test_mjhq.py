"""The small folder in the layout of MJHQ-30K is read like the published one."""

from __future__ import annotations

import numpy as np
from PIL import Image

from experiments.train_tiny import mjhq
from experiments.train_tiny.data import Item
from loraq.config import DataConfig
from loraq.data import data_prompts, real_image_paths


def test_captions_and_pictures_go_to_the_layout(tmp_path):
    drawn = np.zeros((64, 64, 4), np.uint8)
    drawn[:, :32] = (200, 30, 40, 255)
    Image.fromarray(drawn).save(tmp_path / "one.png")
    captions = {
        split: [{"name": f"{split}_{n}", "prompt": f"thing {n}, food fruit", "seen": True}]
        for n, split in enumerate(mjhq.SPLITS)
    }
    item = Item("x", "x", True, tmp_path / "one.png", None)
    items = {entries[0]["name"]: item for entries in captions.values()}
    folder = tmp_path / "MJHQ"
    assert mjhq.write(folder, captions, items) == 3
    prompts = data_prompts(DataConfig(set="mjhq", captions=str(folder), count=3, real="set"))
    assert sorted(p.prompt for p in prompts) == [f"thing {n}, food fruit" for n in range(3)]
    for path in real_image_paths("mjhq", folder, [p.name for p in prompts]):
        values = np.asarray(Image.open(path)).astype(int)
        assert values.shape == (128, 128, 3) and path.parent.name == "food_fruit"
        assert np.abs(values[64, 32] - (200, 30, 40)).max() < 12 and values[64, 100].min() > 240
