"""The committed pipelines load offline, follow the prompt and have trained weights."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiffusionPipeline

from experiments.train_tiny import inspect_weights, model
from experiments.train_tiny.settings import ASSETS, MODELS
from loraq.models import list_layers
from loraq.models.pointwise import weight_matrix


@pytest.fixture(scope="module", params=MODELS)
def settings(request):
    return MODELS[request.param]


@pytest.fixture(scope="module")
def pipe(settings) -> DiffusionPipeline:
    """The committed pipeline in fp32."""
    pipe = DiffusionPipeline.from_pretrained(
        ASSETS / settings.name, dtype=torch.float32, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_size_and_shape(pipe, settings):
    """At most 40 MB, width 384, six blocks, 64 tokens; PixArt with learned-variance channels."""
    folder = ASSETS / settings.name
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) <= 40_000_000
    assert isinstance(pipe, model.networks(settings).PIPELINE)
    config = pipe.transformer.config
    outputs = (2 if settings.name == "tiny_pixart" else 1) * config.in_channels
    assert config.num_layers == settings.blocks and config.out_channels == outputs
    assert config.num_attention_heads * config.attention_head_dim == settings.width
    assert (settings.image_size // settings.stride // config.patch_size) ** 2 == 64


def test_prompt_changes_the_image(pipe, settings):
    """Same seed: the same prompt gives the same image, another prompt a clearly different one."""
    prompts = ["red apple, food fruit", "red apple, food fruit", "automobile, transport ground"]
    images = model.sample(pipe, prompts, [3, 3, 3], steps=8, settings=settings)
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


def test_weights_differ_from_random_matrices(pipe, settings):
    """The top 16 singular values of block weights hold more energy than in random matrices."""
    layers = list_layers(pipe.transformer, inspect_weights.FAMILIES[settings.name], ())
    weights = [weight_matrix(pipe.transformer.get_submodule(layer.name)) for layer in layers]
    energy = [inspect_weights.top_energy(w) for w in weights]
    random = [inspect_weights.top_energy(torch.randn(w.shape)) for w in weights]
    assert sum(energy) / len(energy) > 1.3 * sum(random) / len(random)


@pytest.mark.parametrize("name", MODELS)
def test_normalising_the_latent_is_exact(name):
    """Folding the affine map standardises the latents and keeps the reconstructions."""
    torch.manual_seed(0)
    settings = MODELS[name]
    networks, c = model.networks(settings), settings.latent_channels
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    plain, folded = (networks.autoencoder(settings).eval() for _ in range(2))
    mean = torch.linspace(-1, 2, c) if networks.CENTRED else torch.zeros(c)
    std = torch.linspace(0.5, 3, c)
    networks.normalised(folded, mean, std)
    with torch.no_grad():
        a, b = networks.encode(plain, x), networks.encode(folded, x)
        expected = (a - mean.view(1, c, 1, 1)) / std.view(1, c, 1, 1)
        torch.testing.assert_close(b, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            folded.decode(b).sample, plain.decode(a).sample, rtol=1e-3, atol=1e-4
        )
        if hasattr(plain.encode(x), "latent_dist"):  # variational: std is scaled too
            a, b = (vae.encode(x).latent_dist.std for vae in (plain, folded))
            torch.testing.assert_close(b, a / std.view(1, c, 1, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_an_untrained_model_predicts_zeros_and_learns(name):
    """Output projections are initialised with zeros; the loss decreases in a few steps."""
    settings = MODELS[name]
    networks = model.networks(settings)
    g = torch.Generator().manual_seed(0)
    text, net = networks.encoder(settings), networks.transformer(settings)
    ids = torch.randint(3, settings.vocab_size, (4, settings.text_length), generator=g)
    mask = torch.ones_like(ids)
    side = settings.sides[0]
    x, noise = torch.randn(2, 4, settings.latent_channels, side, side, generator=g)
    hidden = text(input_ids=ids, attention_mask=mask).last_hidden_state
    assert hidden.shape == (4, settings.text_length, settings.text_width)
    first = networks.flow(net, x, torch.full((4,), 0.5), hidden, mask)
    assert first.shape == x.shape and (first == 0).all()
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        flow = networks.flow(net, x, torch.full((4,), 0.5), hidden.detach(), mask)
        loss = (flow - noise).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
