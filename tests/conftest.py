"""A random little PixArt-Σ pipeline and captions, so that the flow is tested in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from loraq import arithmetic

if TYPE_CHECKING:
    from tests.embedded import Embedded

SEED = 7
arithmetic.settle()  # before any test multiplies: the library does it only for its own runs


@pytest.fixture(scope="session")
def embedded() -> Embedded:
    """The embedded model after a short run in 16 bits."""
    from tests.embedded import run_embedded

    return run_embedded()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved PixArtSigmaPipeline of random weights: width 64, two blocks, 64 px."""
    import torch
    from diffusers import (
        AutoencoderKL,
        DPMSolverMultistepScheduler,
        PixArtSigmaPipeline,
        PixArtTransformer2DModel,
    )
    from transformers import T5Config, T5EncoderModel

    from tests.embedded import draw_parameters, word_tokenizer

    torch.manual_seed(SEED)
    tokenizer = word_tokenizer(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    text = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2
    )
    transformer = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=64,
        sample_size=8,
        patch_size=2,
        caption_channels=32,
        use_additional_conditions=False,
        attention_bias=True,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        activation_fn="gelu-approximate",
    )
    draw_parameters(transformer)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    )
    pipe = PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=T5EncoderModel(text),
        vae=vae,
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    )
    folder = tmp_path_factory.mktemp("model") / "tiny"
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def split(name: str, count: int) -> list[dict]:
        colours, animals = ["red", "green", "blue"], ["cat", "dog", "fish"]
        return [
            {
                "name": f"{name}_{i}",
                "prompt": f"a {colours[i % 3]} {animals[i // 3 % 3]}",
                "seen": i % 2 == 0,
            }
            for i in range(count)
        ]

    path = tmp_path_factory.mktemp("captions") / "captions.json"
    splits = {"calibration": split("c", 8), "development": split("d", 4), "test": split("t", 8)}
    path.write_text(json.dumps(splits))
    return path


@pytest.fixture
def overrides(tiny_folder: Path, captions: Path, tmp_path: Path) -> list[str]:
    """Settings that run the whole flow on the little pipeline in a second or two a row."""
    return [
        f"model.path={tiny_folder}",
        "model.height=64",
        "model.width=64",
        "model.steps=2",
        "model.max_sequence_length=8",
        f"data.captions={captions}",
        "data.count=4",
        "data.real=null",
        "metrics.names=[psnr]",
        "metrics.bootstrap=100",
        "generate.batch_size=2",
        "calibration.prompts=2",
        "calibration.measure_prompts=2",
        "calibration.rows_per_layer=64",
        "tracking=disabled",
        "device=cpu",
        f"output={tmp_path / 'outputs'}",
    ]
