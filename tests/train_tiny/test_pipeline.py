"""The committed pipelines load offline, follow the prompt and have trained weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline

from experiments.train_tiny import inspect_weights, model
from experiments.train_tiny.settings import ASSETS, MODELS
from experiments.train_tiny.text import tokenizer as tokenizer_of
from experiments.train_tiny.text import tokens
from loraq.models import list_layers
from loraq.models.layers import family_of
from loraq.models.pointwise import weight_matrix

EMBEDDED = [name for name in MODELS if (ASSETS / name).exists()]


@pytest.fixture(scope="module", params=EMBEDDED)
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
    layers = list_layers(pipe.transformer, family_of(pipe.transformer), ())
    weights = [weight_matrix(pipe.transformer.get_submodule(layer.name)) for layer in layers]
    by_shape = {w.shape: inspect_weights.top_energy(torch.randn(w.shape)) for w in weights}
    energy = [inspect_weights.top_energy(w) for w in weights[::9]]
    random = [by_shape[w.shape] for w in weights[::9]]
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
    settings = replace(MODELS[name], width=128, heads=2)
    networks = model.networks(settings)
    g = torch.Generator().manual_seed(0)
    text, net = networks.encoder(settings), networks.transformer(settings)
    ids = torch.randint(3, settings.vocab_size, (4, settings.text_length), generator=g)
    mask = torch.ones_like(ids)
    side = settings.sides[0]
    x, noise = torch.randn(2, 4, settings.latent_channels, side, side, generator=g)
    seen = [c.detach() for c in networks.conditions(text, ids, mask)]
    assert seen[0].shape == (4, settings.text_length, settings.text_width)
    first = networks.flow(net, x, torch.full((4,), 0.5), *seen)
    assert first.shape == x.shape and (first == 0).all()
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        flow = networks.flow(net, x, torch.full((4,), 0.5), *seen)
        loss = (flow - noise).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_flux_trains_what_its_pipeline_computes():
    """The flow that is trained is the first step's prediction of the unmodified pipeline.

    Packing, positions, times, padding and both encoders then agree between training and sampling.
    """
    settings = MODELS["tiny_flux"]
    networks = model.networks(settings)
    text, net = networks.encoder(settings).eval(), networks.transformer(settings).eval()
    torch.nn.init.normal_(net.proj_out.weight, std=0.1)
    captions = ["red apple, food fruit", "alarm clock, time"]
    tokenizer = tokenizer_of(captions, settings)
    pipe = model.pipeline(tokenizer, text, networks.autoencoder(settings).eval(), net, settings)
    seen = []
    net.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    side = settings.sides[1]
    x = torch.randn(2, settings.latent_channels, side, side)
    pipe(
        captions,
        height=settings.image_size,
        width=settings.image_size,
        latents=networks.pack(x),
        num_inference_steps=1,
        max_sequence_length=settings.text_length,
        output_type="latent",
        **networks.arguments(3.0, 2),
    )
    ids, mask = tokens(tokenizer, captions, settings.text_length)
    with torch.no_grad():
        flow = networks.flow(net, x, torch.ones(2), *networks.conditions(text, ids, mask))
    assert len(seen) == 3  # with the captions, with empty ones, and the training's
    torch.testing.assert_close(networks.pack(flow), seen[0])
    assert not torch.allclose(seen[0], seen[1])


def test_flux_starts_with_open_gates():
    """A block's branches reach the residual stream from the first step, and stay small."""
    settings = MODELS["tiny_flux"]
    net = model.networks(settings).transformer(settings)
    for block in net.transformer_blocks:
        assert block.norm1.linear.bias.view(6, -1)[[2, 5]].eq(1).all()
        assert block.norm1_context.linear.bias.view(6, -1)[[0, 1, 3, 4]].eq(0).all()
    for block in net.single_transformer_blocks:
        assert block.norm.linear.bias.view(3, -1)[2].eq(1).all()
        assert block.proj_out.weight.std() < 0.003
