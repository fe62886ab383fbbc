"""The kernels against the definition, over formats, odd shapes and edges."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraq.errors import LoraqError
from loraq.formats import QuantizedTensor, dequantize, fake_quantize, get_format, quantize
from loraq.formats.packing import pack, packed_bytes
from loraq.layers.backends import Emulated, check_compute, make_compute
from loraq.layers.equation import quantized_linear
from loraq.layers.linear import set_compute
from loraq.layers.triton import Unsupported, prepare
from loraq.layers.triton import layer as layer_module
from loraq.layers.triton.operands import FULL_AXIS, choose_product
from tests.kernels.layers import DEVICE, RECIPES, named, random_input, random_layer

# Products differ from the definition only by the order of fp32 sums. That may change a code of the
# branch's h, which no random case here does. The interpreter rounds a bf16 h differently, by up to
# the last bit.
BOUND = 2e-6
BF16_BOUND = 1e-2
# The interpreter computes with NumPy, which warns about NaN; a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def computed(tensors, x: torch.Tensor) -> torch.Tensor:
    layer = prepare(tensors, x.dtype, DEVICE)
    return layer.multiply(layer.quantize(x.to(DEVICE))).cpu()


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def case(recipe, shape):
    """A random layer, an input and the definition's output; shape: (rows, width, outputs, rank)."""
    rows, width, outputs, rank = shape
    tensors = random_layer(RECIPES[recipe], outputs, width, rank)
    x = random_input(rows, width, positive="GELU" in recipe)
    x = x + 1 if rows == 1 else x
    return tensors, x, quantized_linear(x, bias_O=tensors.bias_O, **tensors.equation_arguments())


@pytest.mark.parametrize("shape", [(37, 200, 40, 10), (1, 33, 7, 3), (5, 64, 130, 70)])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_layer_is_the_definition(recipe, shape):
    tensors, x, wanted = case(recipe, shape)
    bound = BF16_BOUND if tensors.branch_activation.name == "bf16" else BOUND
    assert distance(computed(tensors, x), wanted) < bound


VIEWS = {
    "by columns": lambda x: x.mT.contiguous().mT,  # an SVD's factors
    "one unit of a batch": lambda x: torch.stack([x + 1, x]).mT.contiguous().mT[1],
    "expanded rows": lambda x: x[:1].expand_as(x),
    "offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
    "every other column": lambda x: torch.stack([x, x + 1], -1).flatten(-2)[..., ::2],
}
INPUTS = VIEWS | {
    "columns of a wider matrix": lambda x: torch.cat([x, x[:, :1], x], 1)[:, : x.shape[1]],
    "another order of axes": lambda x: x.T.contiguous().T[:, None].movedim(1, 0),
}


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    recipe=st.sampled_from([name for name in RECIPES if "bf16" not in name]),
    view=st.sampled_from(sorted(INPUTS)),
    rows=st.integers(1, 70),
    width=st.integers(1, 300),
    outputs=st.integers(1, 140),
    rank=st.integers(0, 40),
)
def test_any_size_stride_and_alignment(recipe, view, rows, width, outputs, rank):
    """Tails of every tile and step: the odd sizes leave rows and columns over."""
    tensors, x, _ = case(recipe, (rows, width, outputs, rank))
    x = INPUTS[view](x + (x == 0))  # without zeros, whose relative distance has no meaning
    x = x if "fp16" not in recipe else x.half().float()
    found, wanted = computed(tensors, x), tensors.forward(x)
    assert found.shape == wanted.shape
    assert distance(found, wanted) < (2e-5 if "fp16" in recipe else 5e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_without_a_branch_and_with_leading_axes(bias):
    tensors = random_layer(RECIPES["int4, int8 branch"], rank=0, bias=bias)
    x = random_input(12, 200).view(2, 3, 2, 200)
    wanted = quantized_linear(x, bias_O=tensors.bias_O, **tensors.equation_arguments())
    found = computed(tensors, x)
    assert found.shape == (2, 3, 2, 40) and distance(found, wanted) < BOUND


def test_an_intermediate_that_stays_in_16_bits():
    tensors = random_layer(RECIPES["int4, fp16 branch"], requantize=False)
    x = random_input(9, 200).half().float()
    wanted = quantized_linear(x, bias_O=tensors.bias_O, **tensors.equation_arguments())
    assert distance(computed(tensors, x), wanted) < 1e-3  # h has fp16's last bit


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", ["fp16", "bf16", "int8"])
def test_what_a_solver_returns_is_read_as_what_a_file_returns(name, view):
    """The first run packs a solver's factors, whatever their strides; a second one loads them."""
    tensors = random_layer(RECIPES[f"int4, {name} branch"], rank=16)
    x = random_input(9, 200).half().float()
    first, second = {}, {}
    for part in ("left", "right"):
        strided = VIEWS[view](dequantize(getattr(tensors, part)))
        first[part] = quantize(strided, named(name))
        assert all(t.is_contiguous() for t in first[part].tensors().values())
        second[part] = quantize(strided.contiguous().clone(), named(name))
    assert tensors.bias_O is not None
    bias = VIEWS[view](tensors.bias_O[None]).squeeze(0)
    found = [
        computed(replace(tensors, **first, bias_O=bias), x),
        replace(tensors, **first, bias_O=bias).forward(x),
    ]
    loaded = replace(tensors, **second, bias_O=bias.clone())
    assert torch.equal(found[0], computed(loaded, x)) and torch.equal(found[1], loaded.forward(x))
    assert distance(found[0], found[1]) < (BOUND if name == "int8" else BF16_BOUND)  # h's last bit


@pytest.mark.parametrize("shape", [(0, 200), (4, 0, 200)])
def test_empty_batches(shape):
    found = computed(random_layer(RECIPES["int4, int8 branch"]), torch.zeros(shape))
    assert found.shape == (*shape[:-1], 40)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_inputs_of_16_bits_keep_their_type(dtype):
    if dtype == torch.bfloat16 and DEVICE.type == "cpu":
        pytest.skip("Triton's interpreter rounds bf16 differently")
    tensors = random_layer(RECIPES["int4, int8 branch"])
    x = random_input(9, 200).to(dtype)
    wanted = quantized_linear(x.float(), bias_O=tensors.bias_O, **tensors.equation_arguments())
    found = computed(tensors, x)
    assert found.dtype == dtype and distance(found, wanted) < 2e-3


ACTIVATIONS = sorted({name for names in RECIPES.values() for name in (names[1], names[3])})
BLOCKED = [name for name in ACTIVATIONS if name not in ("bf16", "fp16")]


@pytest.mark.parametrize("width", [7, 64, 200])
@pytest.mark.parametrize("exponent", ["floor", "even", "rceil", "ceil"])
@pytest.mark.parametrize("name", BLOCKED)
def test_codes_are_those_of_the_formats(name, exponent, width):
    """Bitwise equal after decoding, except that minus zero is zero here.

    Scales per token are applied after the product.
    """
    fmt = named("nvfp4 fixed" if name == "nvfp4" else name)
    if fmt.scale != "e8m0" and exponent != "floor":
        pytest.skip("only shared exponents are rounded by a rule")
    if fmt.scale == "e8m0":
        fmt = get_format(name, exponent=exponent)
    x = random_input(19, width, positive=name == "uint4")
    x[3] *= 1e-30
    x[4, :3] = torch.tensor([5e-8, -5e-8, 0.0])
    product = choose_product(fmt, fmt, DEVICE)
    if fmt.family == "mxfp" and fmt.bits != 6:
        assert product.mode == "scaled"
        values = replace(product, mode="values", dtype=torch.float32)  # on GPUs without MX products
        found = written_values(x, fmt, values)
        assert torch.equal(found, fake_quantize(x, fmt) + 0.0)
    found, wanted = written_values(x, fmt, product), fake_quantize(x, fmt) + 0.0
    rounding = 2**-23 if fmt.tensor_scale == "token" else 0  # of the product of the two scales
    assert ((found - wanted).abs() <= rounding * wanted.abs()).all()


def written_values(x: torch.Tensor, fmt, product) -> torch.Tensor:
    """What the first kernel writes, dequantised."""
    main, _ = layer_module.quantize_operands(x.to(DEVICE), fmt, product)
    width, codes = x.shape[1], main.codes.cpu()
    if product.mode != "int":
        assert not codes[
            :, packed_bytes(width, fmt.bits) if product.mode == "scaled" else width :
        ].any()
    tensor_scale = main.tensor_scale
    tensor_scale = tensor_scale.cpu()[:, None] if isinstance(tensor_scale, torch.Tensor) else None
    if product.mode == "values":
        return codes[:, :width] * (1.0 if tensor_scale is None else tensor_scale) + 0.0
    if product.mode == "int":
        codes = pack(codes[:, :width].view(torch.uint8) & ((1 << fmt.bits) - 1), fmt.bits)
    codes, blocks = codes[:, : packed_bytes(width, fmt.bits)], -(-width // min(main.block, width))
    scale = main.scale.cpu()[:, :blocks]
    return dequantize(QuantizedTensor(codes, scale, tensor_scale, tuple(x.shape), fmt)) + 0.0


def test_one_scale_per_token_or_per_matrix():
    names = ("int4", "int4", "int8", "int8")
    tensors = random_layer(names)
    whole = {"activation": get_format("int8", block="token")}
    weight = get_format("int8", block="tensor")
    tensors = replace(tensors, weight=quantize(dequantize(tensors.weight), weight), **whole)
    x = random_input(9, 200)
    layer = prepare(tensors, x.dtype, DEVICE)
    assert layer.weight.block == FULL_AXIS and layer.main.mode == "int"
    wanted = quantized_linear(x, bias_O=tensors.bias_O, **tensors.equation_arguments())
    assert distance(computed(tensors, x), wanted) < BOUND


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("recipe", ["int4, int8 branch", "mxfp4, mxfp8 branch", "nvfp4"])
def test_non_finite_inputs_give_non_finite_outputs(recipe, value):
    tensors = random_layer(RECIPES[recipe], rank=0)
    x = random_input(5, 200)
    x[2, 150] = value
    found = computed(tensors, x)
    assert not found[2].isfinite().any() and found[[0, 1, 3, 4]].isfinite().all()


REFUSED = {
    "groups of 16": (("int4", "int4", "int8", "int8"), {"block": 16}, "powers of two ≥ 32"),
    "16-bit activations of int weights": (("int4", "int4", "int4", "fp16"), {}, "exactly"),
    "searched scales": (("int4", "int4", "int8", "int8"), {"clip": "mse"}, "clip=mse"),
    "tensor_scale=token in the branch": (
        ("int4", "int4", "nvfp4", "nvfp4 token"),
        {},
        "a branch's",
    ),
    "tensor_scale=token of a weight": (
        ("nvfp4 token", "nvfp4", "int8", "int8"),
        {},
        "weights in .*tensor_scale=token",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_layers_without_a_kernel_raise(case):
    names, options, words = REFUSED[case]
    tensors = random_layer(names)
    if options:
        tensors = replace(tensors, activation=get_format(names[1], **options))
    with pytest.raises(Unsupported, match=words):
        prepare(tensors, torch.float32, DEVICE)
    with pytest.raises(Unsupported, match="compute=emulate"):
        make_compute("triton", tensors, torch.float32, DEVICE)
    assert isinstance(make_compute("auto", tensors, torch.float32, DEVICE), Emulated)


def test_recipes_without_a_kernel_raise():
    """The same errors before anything is quantised, from formats, rank and widths."""
    from loraq import recipe

    def refused(words: str, *overrides: str, rank: int = 16) -> None:
        chosen = recipe("loraq_o2", *overrides)
        arguments = chosen.formats(), chosen.requantize_intermediate, rank, (64, 200)
        with pytest.raises(Unsupported, match=words):
            check_compute(*arguments, DEVICE)

    for name in ("loraq_o2", "loraq_best", "svdquant"):
        chosen = recipe(name)
        check_compute(chosen.formats(), chosen.requantize_intermediate, 16, (64, 200), DEVICE)
    refused("powers of two ≥ 32", "quant.activation.block=16")
    refused("clip=mse", "quant.activation.clip=mse")
    refused("keeps x·Rᵀ in float", "quant.requantize_intermediate=false")
    refused("a branch's", "format@quant.branch_activation=nvfp4", "format@quant.branch_weight=int4")
    refused("rank 300; the limit is 256", rank=300)


def test_layers_of_one_input_may_use_different_back_ends(model):
    """q with kernels, k and v emulated; and moving one of them does not affect the others."""
    from copy import deepcopy

    from loraq import recipe
    from loraq.models import list_layers
    from loraq.quantization.quantizer import quantize_model

    model = deepcopy(model)
    layers = list_layers(model, "pixart_sigma", ())
    quantize_model(model, layers, recipe("loraq_o2"), progress=None).apply(model)
    attention = model.transformer_blocks[0].attn1
    readers = [attention.to_q, attention.to_k, attention.to_v]
    x = random_input(6, 64).to(DEVICE)
    with torch.no_grad():
        wanted = [reader(x).cpu() for reader in readers]
        set_compute(attention.to_q, "triton")
        found = [reader(x).cpu() for reader in readers]
    assert all(distance(f, w) < BOUND for f, w in zip(found, wanted, strict=True))
    attention.to_v.to(DEVICE)
    model.to("meta")
    assert {reader.right_codes.device.type for reader in readers} == {"meta"}


def test_too_high_a_rank_raises():
    with pytest.raises(Unsupported, match="rank 300; the limit is 256"):
        prepare(random_layer(RECIPES["int8"], rank=300), torch.float32, DEVICE)


@pytest.fixture(scope="module")
def model():
    from tests.little import little_pixart

    return little_pixart().transformer.to(DEVICE).eval()


def test_a_complete_model_runs_and_q_k_v_quantise_their_input_once(model, monkeypatch):
    from loraq import recipe
    from loraq.models import list_layers
    from loraq.quantization.quantizer import quantize_model

    with pytest.raises(LoraqError, match="has none"):
        set_compute(model, "triton")
    layers = list_layers(model, "pixart_sigma", ())
    packed = quantize_model(model, layers, recipe("loraq_o2"), progress=None)
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 6, 32, generator=g)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return model(
                x.to(DEVICE),
                encoder_hidden_states=text.to(DEVICE),
                timestep=torch.tensor([10, 700], device=DEVICE),
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
                return_dict=False,
            )[0].cpu()

    packed.apply(model)
    try:
        wanted, launches = forward(), []
        launch = layer_module.launch_input
        monkeypatch.setattr(
            layer_module, "launch_input", lambda *a: launches.append(a[0].shape) or launch(*a)
        )
        set_compute(model, "triton")
        found = forward()
        launches.clear()  # the first forward compares the kernels with the emulation as well
        assert torch.equal(forward(), found)
        assert 0 < distance(found, wanted) < 1e-3 and len(launches) == len(packed.layers) - 2 * 3
        set_compute(model, "emulate")
        assert torch.equal(forward(), wanted)
        with pytest.raises(LoraqError, match="Did you mean 'triton'"):
            set_compute(model, "tritn")
    finally:
        packed.revert(model)


@pytest.mark.parametrize(
    "shape", [(37, 200, 40, 10), (1, 33, 7, 3), (5, 64, 130, 0), (0, 64, 8, 4)]
)
@pytest.mark.parametrize("recipe", RECIPES)
def test_products_in_bfloat16_on_a_cpu_stay_near_the_definition(recipe, shape):
    tensors, x, wanted = case(recipe, shape)
    layer = Emulated(tensors, torch.bfloat16, torch.device("cpu"), operands=torch.bfloat16)
    found = layer.multiply(layer.quantize(x))
    assert found.dtype == torch.bfloat16 and found.shape == wanted.shape
    # a bf16 h may get another code than a float32 h, which is a large step with 4 bits
    bound = 2 * BF16_BOUND if named(RECIPES[recipe][3]).bits == 4 else BF16_BOUND
    assert not len(x) or distance(found, wanted) < bound


def test_auto_multiplies_in_bfloat16_if_model_and_processor_support_it(monkeypatch):
    tensors, cpu = random_layer(RECIPES["int4, int8 branch"]), torch.device("cpu")
    for units, mode, dtype, wanted in (
        (True, "auto", torch.bfloat16, torch.bfloat16),
        (False, "auto", torch.bfloat16, torch.float32),
        (True, "auto", torch.float32, torch.float32),
        (True, "emulate", torch.bfloat16, torch.float32),
    ):
        monkeypatch.setattr(
            "loraq.utils.batch_invariance.bfloat16_units", lambda there=units: there
        )
        made = make_compute(mode, tensors, dtype, cpu)
        assert made.operands == wanted and made.dtype == torch.float32
