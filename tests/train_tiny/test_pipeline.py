"""The committed pipeline loads offline, follows the prompt and has weights that were trained."""

from __future__ import annotations

import pytest
import torch
from diffusers import PixArtSigmaPipeline

from experiments.train_tiny import export, inspect_weights, model, vae
from experiments.train_tiny.settings import ASSETS, SETTINGS

FOLDER = ASSETS / "tiny_pixart"


@pytest.fixture(scope="module")
def pipe() -> PixArtSigmaPipeline:
    """Return the committed pipeline in fp32."""
    pipe = PixArtSigmaPipeline.from_pretrained(FOLDER, dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_size_and_shape(pipe):
    """At most 40 MB, width 384, six blocks, 64 tokens, learned-variance channels."""
    assert sum(f.stat().st_size for f in FOLDER.rglob("*") if f.is_file()) <= 40_000_000
    config = pipe.transformer.config
    assert config.num_layers == 6 and config.out_channels == 2 * config.in_channels
    assert config.num_attention_heads * config.attention_head_dim == SETTINGS.width


def test_prompt_changes_the_image(pipe):
    """Same seed: the same prompt gives the same image, another prompt a clearly different one."""
    prompts = ["red apple, food fruit", "red apple, food fruit", "automobile, transport ground"]
    images = model.sample(pipe, prompts, [3, 3, 3], steps=8)
    assert images.shape == (3, 3, 128, 128) and images.isfinite().all()
    same = (images[0] - images[1]).abs().mean()
    other = (images[0] - images[2]).abs().mean()
    assert same < 1e-4
    assert other > 0.05


def test_no_word_is_unknown(pipe):
    """Byte-level pieces cover any text."""
    ids = pipe.tokenizer("Xylophonist, zebra-crossing 42 ü 漢").input_ids
    assert pipe.tokenizer.unk_token_id not in ids
    assert ids[-1] == pipe.tokenizer.eos_token_id


def test_weights_left_their_random_start(pipe):
    """The block weights hold clearly more energy in 16 directions than Gaussian matrices."""
    weights = [
        m.weight.float()
        for n, m in pipe.transformer.named_modules()
        if isinstance(m, torch.nn.Linear) and n.startswith("transformer_blocks.")
    ]
    energy = [inspect_weights.top_energy(w) for w in weights]
    random = [inspect_weights.top_energy(torch.randn(w.shape)) for w in weights]
    assert sum(energy) / len(energy) > 1.3 * sum(random) / len(random)


def test_normalising_the_latent_is_exact():
    """Folding the affine map standardises the latents and keeps the reconstructions."""
    torch.manual_seed(0)
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    plain, folded = vae.build().eval(), vae.build().eval()
    mean, std = torch.tensor([0.5, -1.0, 2.0, 0.0]), torch.tensor([0.5, 2.0, 3.0, 1.0])
    export.normalised(folded, mean, std)
    with torch.no_grad():
        a, b = plain.encode(x).latent_dist, folded.encode(x).latent_dist
        expected = (a.mean - mean.view(1, 4, 1, 1)) / std.view(1, 4, 1, 1)
        torch.testing.assert_close(b.mean, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(b.std, a.std / std.view(1, 4, 1, 1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            folded.decode(b.mean).sample, plain.decode(a.mean).sample, rtol=1e-3, atol=1e-4
        )
