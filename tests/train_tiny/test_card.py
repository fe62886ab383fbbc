"""Model cards and configurations say what the settings, records and files say."""

from __future__ import annotations

import json
import shutil

import pytest

from experiments.train_tiny import card, roles
from experiments.train_tiny.settings import ASSETS, MODELS, RECORD, ROOT


@pytest.mark.parametrize("name", ["tiny_pixart", "tiny_sana"])
def test_committed_configurations_are_what_the_command_writes(name):
    """conf/model/NAME.yaml, byte for byte."""
    committed = (ROOT / "conf/model" / f"{name}.yaml").read_text(encoding="utf-8")
    assert card.model_yaml(MODELS[name], f"asset:{name}") == committed


def test_a_card_states_the_record(tmp_path):
    """Sizes, minutes, scores and the words on the grid come from the files."""
    for file in RECORD.glob("tiny_sana_*"):
        shutil.copy(file, tmp_path)
    training = {
        "pictures": 1852,
        "subjects": 320,
        "held_out": 160,
        "vae_steps": 3000,
        "vae_minutes": 25.0,
        "steps": 6200,
        "minutes": None,
        "loss": 0.0912,
        "bytes": 36_800_000,
        "parameters": {"transformer": 15_259_408, "text_encoder": 1_837_312, "vae": 1_238_291},
    }
    (tmp_path / "tiny_sana_training.json").write_text(json.dumps(training))
    text = card.card(ASSETS / "tiny_sana", tmp_path, MODELS["tiny_sana"])
    assert "Nobody has described the grid yet" in text
    (tmp_path / "tiny_sana_seen.md").write_text("Nearly all seen subjects are recognised.")
    text = card.card(ASSETS / "tiny_sana", tmp_path, MODELS["tiny_sana"])
    for expected in (
        "bf16, 36.8 MB",
        "| transformer | `SanaTransformer2DModel`, width 384 = 6 x 64, six blocks",
        "3,000 steps (25 minutes)",
        "6,200 steps (– minutes)",
        "| this model | 162.4 | 0.164 | 0.073 | 0.80 | 0.63 |",
        "| real images | 0.0 | 0.272",
        "hold 55% of the energy (Gaussian matrices of these shapes: 14%)",
        "Nearly all seen subjects are recognised.",
        "complex_human_instruction=None",
    ):
        assert expected in text, expected


def test_roles_are_means_over_their_layers():
    """Two layers of one role become one row; shares keep four digits."""
    base = dict.fromkeys(roles.MEANS, "1.0") | {"role": "ff_up"}
    rows = roles.by_role("m", [base | {"half": "0.1"}, base | {"half": "0.2"}])
    assert [(r["role"], r["layers"], r["half"], r["kurtosis"]) for r in rows] == [
        ("ff_up", "2", "0.1500", "1.00")
    ]


def test_the_page_shows_the_records():
    """docs/small_models.md has the tables that the committed records give."""
    assert roles.PAGE.read_text(encoding="utf-8") == roles.current()
