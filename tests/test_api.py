"""`import loraq` imports nothing heavy; `loraq.quantize` quantises a pipeline as the CLI does."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import loraq
from loraq.compose import load_rows
from loraq.errors import LoraqError
from loraq.quantization.diffusers_config import PackedConfig


def test_importing_loads_nothing_heavy():
    heavy = "{'torch', 'diffusers', 'hydra', 'wandb'}"
    code = f"import sys, loraq; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_dir_lists_the_public_names():
    assert set(dir(loraq)) == set(loraq.__all__) == {*loraq._MODULES, "__version__"}
    assert all(getattr(loraq, name) is not None for name in loraq.__all__)


def test_a_recipe_is_the_preset_with_overrides():
    made = loraq.recipe("loraq_o2", "format@quant.branch_weight=int4", "quant.branch.budget=0.32")
    assert made.branch_weight.name == "int4" and made.branch.budget == 0.32
    assert made.branch.kind == "loraq" and made.branch.objective == "shape"
    assert made.skip is None  # taken from the model family
    with pytest.raises(LoraqError, match="loraq_o2"):
        loraq.recipe("loraq_o3")
    with pytest.raises(LoraqError, match="no recipe"):
        loraq.recipe("reference")


class Pipe:
    """The only attribute of a pipeline that data-free quantisation reads."""

    def __init__(self, transformer):
        self.transformer = transformer


def tiny_transformer():
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=8, num_layers=1,
        cross_attention_dim=64, sample_size=8, patch_size=2, caption_channels=32,
        norm_type="ada_norm_single", attention_bias=True, norm_elementwise_affine=False,
    ).eval()  # fmt: skip


def output(transformer):
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return transformer(
            torch.randn(1, 4, 8, 8, generator=g),
            encoder_hidden_states=torch.randn(1, 6, 32, generator=g),
            timestep=torch.tensor([500.0]),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample


def test_quantising_in_place_and_back():
    pipe = Pipe(tiny_transformer())
    before = output(pipe.transformer)
    chosen = loraq.recipe("loraq_o2", "quant.branch.budget=null", "quant.branch.rank=8")
    model = loraq.quantize(pipe, chosen, progress=False)
    assert len(model.layers) == 8 and model.rank == 8
    assert repr(model) == (
        "QuantizedModel(loraq/shape: 8 layers, 57.34k weights, 5.895 bits/weight, rank 8, "
        "weight=int4, branch=int8)"
    )
    table = model._repr_html_()
    assert table.count("<tr>") == 9 and "<td>ff_up</td><td>1</td><td>256 × 64</td>" in table
    assert "weight=int4" in repr(pipe.transformer.transformer_blocks[0].attn1.to_q)
    after = output(pipe.transformer)
    assert 0 < (after - before).norm() / before.norm() < 0.5
    model.revert(pipe.transformer)
    assert torch.equal(output(pipe.transformer), before)


def test_prompts_are_for_calibrated_recipes_only():
    pipe = Pipe(tiny_transformer())
    with pytest.raises(LoraqError, match="prompts"):
        loraq.quantize(pipe, "svdquant", progress=False)
    with pytest.raises(LoraqError, match="data-free"):
        loraq.quantize(pipe, "rtn", prompts=["a cat"], progress=False)


ONE_TEXT = {
    "prompts": lambda: loraq.quantize(Pipe(tiny_transformer()), "svdquant", prompts="red apple"),
    "overrides": lambda: load_rows("experiment=demo"),
    "overrides=": lambda: PackedConfig("rtn", overrides="quant.seed=1"),
}


@pytest.mark.parametrize("name", ONE_TEXT)
def test_one_text_is_not_read_letter_by_letter(name):
    with pytest.raises(LoraqError, match=rf"{name.strip('=')}='.* is one text, not a list"):
        ONE_TEXT[name]()


def test_prompts_that_are_not_text_are_refused():
    for prompts in (["a cat", None], [b"a cat"], 3, [["a cat"]]):
        with pytest.raises(LoraqError, match=r"prompts.* Pass a list of texts"):
            loraq.quantize(Pipe(tiny_transformer()), "svdquant", prompts=prompts)


class OwnPipe(Pipe):
    """A user's pipeline, with a call and without diffusers' list of components."""

    def __call__(self, prompt, generator, output_type, num_inference_steps=1):
        for _ in range(num_inference_steps):
            output(self.transformer)


def test_a_calibrated_recipe_takes_a_pipeline_of_the_users_own():
    """Statistics are of the transformer's calls, whatever calls it; its networks are checked."""
    pipe = OwnPipe(tiny_transformer())
    chosen = loraq.recipe("svdquant", "quant.branch.budget=null", "quant.branch.rank=4")
    pipe.decoder = torch.nn.Linear(2, 2)
    pipe.decoder.bias.data[0] = torch.nan
    with pytest.raises(LoraqError, match=r"decoder.bias': 1 of 2 values are NaN"):
        loraq.quantize(pipe, chosen, prompts=["a cat"], progress=False)
    pipe.decoder.bias.data[0] = 0
    model = loraq.quantize(
        pipe, chosen, prompts=["a cat"], call={"num_inference_steps": 2}, progress=False
    )
    assert len(model.layers) == 8
    model.revert(pipe)
    with pytest.raises(LoraqError, match="no 16-bit layers"):
        model.revert(pipe)


class CalledPipe(Pipe):
    """A pipeline whose call has two arguments; it is never called."""

    def __call__(self, prompt, num_inference_steps=20, output_type="pil", generator=None):
        raise AssertionError("arguments are checked before the pipeline is called")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rows_per_layer": 0}, ["rows_per_layer=0", "limit 1"]),
        ({"rows_per_layer": "many"}, ["rows_per_layer='many'", "whole number"]),
        ({"batch_size": 0}, ["batch_size=0", "limit 1"]),
        ({"batch_size": float("nan")}, ["batch_size=nan", "whole number"]),
        ({"recipe": 3}, ["recipe=3", "preset"]),
        ({"call": {"num_inference_step": 2}}, ["num_inference_step", "'num_inference_steps'"]),
        ({"call": {"prompt": "a dog"}}, ["call.prompt", "prompts=[…]"]),
        ({"call": ["steps"]}, ["call=['steps']", "keyword arguments"]),
        ({"call": {"num_inference_steps": 2}, "prompts": None}, ["call=", "no effect"]),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_before_anything_runs(arguments, words):
    given = {"recipe": "svdquant", "prompts": ["a cat"], "progress": False, **arguments}
    with pytest.raises(LoraqError) as caught:
        loraq.quantize(CalledPipe(tiny_transformer()), **given)
    for word in words:
        assert word in str(caught.value)


def test_a_network_without_blocks_raises():
    with pytest.raises(LoraqError, match=r"Linear has no repeated blocks.*Use a diffusion transf"):
        loraq.quantize(Pipe(torch.nn.Linear(2, 2)), "rtn", progress=False)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda pipe: pipe.transformer, r"takes a pipeline and got a PixArt.*not pipe.transformer"),
        (lambda pipe: Pipe(None), "a pipeline with a transformer, and this Pipe has none"),
        (lambda pipe: "PixArt", "a pipeline with a transformer, and this str has none"),
    ],
)
def test_what_is_no_pipeline_with_a_transformer_is_refused_in_words(given, words):
    with pytest.raises(LoraqError, match=words):
        loraq.quantize(given(Pipe(tiny_transformer())), "rtn", progress=False)


def test_the_family_of_another_model_is_refused():
    class Own(type(tiny_transformer())):
        """A user's subclass is of its base's family."""

    pipe = Pipe(tiny_transformer())
    for kind in (type(pipe.transformer), Own):
        pipe.transformer.__class__ = kind
        with pytest.raises(LoraqError, match=r"family=sana: .* of family 'pixart_sigma'"):
            loraq.quantize(pipe, "rtn", family="sana", progress=False)
    with pytest.raises(LoraqError, match="Unknown model family 'pixart'"):
        loraq.quantize(pipe, "rtn", family="pixart", progress=False)
    assert len(loraq.quantize(pipe, "rtn", progress=False).layers) == 8


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda net: net.pos_embed.proj.bias.data.fill_(torch.nan),
            r"transformer.pos_embed.proj.bias': 64 of 64 values are NaN",
        ),
        (
            lambda net: net.transformer_blocks[0].ff.net[2].bias.data[0].fill_(torch.inf),
            r"ff.net.2.bias': 1 of 64 values are NaN or infinite",
        ),
        (
            lambda net: net.proj_out.to("meta"),
            r"transformer.proj_out.weight' is on the meta device",
        ),
    ],
)
def test_a_tensor_without_finite_values_is_named(damage, words):
    pipe = Pipe(tiny_transformer())
    damage(pipe.transformer)
    with pytest.raises(LoraqError, match=words):
        loraq.quantize(pipe, "rtn", progress=False)


def test_packed_layers_go_only_into_the_model_they_were_made_from():
    """Another model's layers were replaced, and it got this one's 16-bit layers back."""
    pipe, other = Pipe(tiny_transformer()), tiny_transformer()
    model = loraq.quantize(pipe, "rtn", progress=False)
    assert len(model.samples) == 8
    for move in (model.apply, model.revert):
        with pytest.raises(LoraqError, match=r"not of a Pipe. Pass the pipeline"):
            move(Pipe(None))
    with pytest.raises(LoraqError, match=r"applied to another PixArt.*\.revert"):
        model.apply(other)
    with pytest.raises(LoraqError, match="was applied to another PixArt"):
        model.revert(other)
    model.revert(pipe)  # the same as its transformer
    with pytest.raises(LoraqError, match="no 16-bit layers"):
        model.revert(pipe.transformer)
    halved = tiny_transformer().bfloat16()  # the same model in another type
    with model.applied(halved):
        assert "weight=int4" in repr(halved)
    before = output(other)
    other.transformer_blocks[0].attn1.to_q.weight.data.mul_(2)
    with pytest.raises(LoraqError, match=r"attn1.to_q' of this PixArt.* has other weights"):
        model.apply(other)
    other.transformer_blocks[0].attn1.to_q.weight.data.div_(2)
    assert torch.equal(output(other), before)  # nothing was replaced
    other.transformer_blocks[0].ff.net[2] = torch.nn.Linear(128, 64)
    with pytest.raises(LoraqError, match=r"ff.net.2' is \(64, 256\) .* \(64, 128\) in this"):
        model.apply(other)
    other.transformer_blocks = other.transformer_blocks[:0]
    with pytest.raises(LoraqError, match=r"'transformer_blocks.0.*missing in this"):
        model.apply(other)
