"""A model card lies beside every checkpoint that diffusers saves, and says what the files hold."""

from __future__ import annotations

import shutil

import pytest
import yaml
from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel

import loraq
from loraq.diffusers_quantizer import packed_layers
from loraq.quantization.card_file import CARD
from loraq.quantization.model_card import write_card


@pytest.fixture(scope="module")
def packed(tiny_folder):
    """A packed pipeline, and what `loraq.quantize` returned."""
    pipe = PixArtSigmaPipeline.from_pretrained(tiny_folder)
    return pipe, loraq.quantize(
        pipe,
        loraq.recipe("lqer", "quant.branch.rank=4", "quant.skip=['*attn2*']"),
        progress=False,
    )


def header_of(folder) -> dict:
    return next(yaml.safe_load_all((folder / CARD).read_text("utf-8")))


def test_a_saved_pipeline_has_one_card_with_what_it_holds(packed, tmp_path):
    pipe, made = packed
    pipe.save_pretrained(tmp_path / "pipe")
    assert [*(tmp_path / "pipe").rglob(CARD)] == [tmp_path / "pipe" / CARD]
    text = (tmp_path / "pipe" / CARD).read_text("utf-8")
    assert header_of(tmp_path / "pipe") == {
        "library_name": "diffusers",
        "tags": ["loraq", "quantized", "int4"],
    }
    for part in (
        f"| quantised layers | {len(made.layers)}, with {made.weights:,} weights |",
        f"| bits per weight | {made.bits_per_weight:.3f}, ",
        f"| bytes | {made.nbytes:,} ",
        "| low-rank branch | rank 4; factors int8 g64, their inputs int8 g64 |",
        f"loraq {loraq.__version__}",
        "- `transformer_blocks.*.attn2.to_q`: 8,192 weights",
        "- `transformer_blocks.*.scale_shift_table`: 768 weights",
        "- `text_encoder` (T5EncoderModel)",
        'PixArtSigmaPipeline.from_pretrained("FOLDER", dtype=torch.float32)',
        "  objective: compensate",
    ):
        assert part in text
    assert str(tmp_path.parent) not in text  # no path of this machine
    assert "transformer_blocks.*.attn1" not in text


def test_equal_models_have_equal_cards_after_loading_too(packed, tmp_path):
    pipe, _ = packed
    pipe.transformer.save_pretrained(tmp_path / "net")
    loaded = PixArtTransformer2DModel.from_pretrained(tmp_path / "net")
    loaded.save_pretrained(tmp_path / "again")
    card = (tmp_path / "net" / CARD).read_bytes()
    assert (tmp_path / "again" / CARD).read_bytes() == card
    assert f"{packed_layers(loaded).nbytes:,}".encode() in card
    loaded.dequantize().save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / CARD).exists()


def test_a_card_is_renewed_and_a_readme_of_others_stays(packed, tmp_path):
    net, card = packed[0].transformer, tmp_path / CARD
    write_card(net, tmp_path, "| PSNR |\n|---|\n| 12 |")
    assert "| 12 |" in card.read_text()
    write_card(net, tmp_path)
    assert "Not measured" in card.read_text()
    for edited in (card.read_bytes().replace(b"Not measured", b"Measured"), b"mine \xff"):
        card.write_bytes(edited)
        write_card(net, tmp_path)
        assert card.read_bytes() == edited


def test_base_model_and_licence_are_those_of_the_source(packed, tmp_path):
    pipe, _ = packed
    net = pipe.transformer  # its source counts, not that of a pipeline that it was put into
    source = tmp_path / "models--owner--a-model" / "snapshots" / "0123"
    source.mkdir(parents=True)
    (source / "model_index.json").write_text("{}")
    (source / CARD).write_text("---\nlicense: other\nlicense_name: its-own\n---\n# A model\n")
    known = {"license": "other", "license_name": "its-own"}
    for owner, place in ((pipe, source), (net, source / "transformer")):
        place.mkdir(exist_ok=True)
        before = net.config.get("_name_or_path")
        net.register_to_config(_name_or_path=str(place))
        write_card(owner, tmp_path / "card")
        header = header_of(tmp_path / "card")
        assert header["base_model"] == "owner/a-model"
        assert header.items() >= known.items()
        # a packed folder that is saved again names what it was made from
        net.register_to_config(_name_or_path=str(shutil.copytree(tmp_path / "card", place / "c")))
        write_card(owner, tmp_path / "card")
        assert header_of(tmp_path / "card") == header
        (source / CARD).write_text("---\n[\n---\n")  # cannot be read
        net.register_to_config(_name_or_path=str(source))
        write_card(owner, tmp_path / "card")
        assert "license" not in header_of(tmp_path / "card")
        (source / CARD).write_text("---\nlicense: other\nlicense_name: its-own\n---\n")
        net.register_to_config(_name_or_path=before)
