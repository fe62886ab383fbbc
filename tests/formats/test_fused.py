"""The fused kernel gives the bits of the definition, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch

from loraq.errors import LoraqError
from loraq.formats import FORMATS, get_format
from loraq.formats.fake import by_operations
from loraq.formats.operator import fake_quantize_each, fake_quantize_into
from loraq.formats.triton import fake, probe
from loraq.formats.triton.fake import MAX_BLOCK, Before, launch, supported
from loraq.transforms import InputTransform
from loraq.transforms.hadamard import hadamard_matrix

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RULES = ("floor", "ceil", "even", "rceil")
MX = [name for name in FORMATS if name.startswith("mx")]
FORMS = [get_format(name, exponent=rule) for name in MX for rule in RULES]
FORMS += [
    get_format(name, scale=scale)
    for name in ("int4", "int6", "int8", "uint4")
    for scale in ("fp16", "bf16")
]
FORMS += [
    get_format("nvfp4", tensor_scale=scale) for scale in ("tensor", "token", "fixed", "fixed_floor")
]
BLOCKS = [1, 3, 16, 48, 256, "channel"]
OF_BLOCKS = [get_format(name, block) for block in BLOCKS for name in ("int4", "mxfp6_e3m2")]
OF_BLOCKS += [get_format("nvfp4", block, tensor_scale="token") for block in BLOCKS]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The interpreter computes with NumPy, which warns about NaN; a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def sample(rows: int, width: int) -> torch.Tensor:
    """Tokens of very different magnitudes, ties, and rows and blocks of zeros."""
    g = torch.Generator().manual_seed(rows + width)
    x = torch.randn(rows, width, generator=g) * torch.logspace(-8, 4, rows)[:, None]
    x[0] = 0
    x[1] = torch.randint(-30, 31, (width,), generator=g) / 4
    x[2, : width // 2] = 0
    x[3] *= 1e-33
    x[4] = x[4].sign() * torch.finfo(torch.float32).max * torch.rand(width, generator=g)
    return x


def assert_same(x: torch.Tensor, fmt, dtype: torch.dtype) -> None:
    out = torch.empty(x.shape, dtype=dtype, device=DEVICE)
    there = x.to(DEVICE)
    assert there.stride() == x.stride() and supported(there, fmt, dtype), fmt.label
    launch(there, [(fmt, out)])
    check(out, by_operations(x, fmt, dtype), fmt.label)


def check(found: torch.Tensor, wanted: torch.Tensor, label: str) -> None:
    found, nan = found.cpu(), wanted.isnan()
    bits = {2: torch.int16, 4: torch.int32}[wanted.element_size()]
    assert torch.equal(found.isnan(), nan), label
    assert torch.equal(found[~nan].view(bits), wanted[~nan].view(bits)), label


@pytest.mark.parametrize("fmt", FORMS, ids=lambda fmt: fmt.label)
def test_formats_and_rules(fmt):
    x = sample(9, 83)
    assert_same(x, fmt, torch.float32)
    assert_same(x.bfloat16(), fmt, torch.bfloat16)


@pytest.mark.parametrize("fmt", OF_BLOCKS, ids=lambda fmt: fmt.label)
def test_blocks_and_widths(fmt):
    for rows, width in ((5, 7), (6, 64), (37, 200)):
        assert_same(sample(rows, width), fmt, torch.float32)


@pytest.mark.parametrize("given", DTYPES, ids=str)
@pytest.mark.parametrize("wanted", DTYPES, ids=str)
def test_types_of_input_and_result(given, wanted):
    for name in ("int4", "mxfp4_e2m1"):
        assert_same(sample(9, 83).to(given), get_format(name), wanted)


@pytest.mark.parametrize("name", ["int4", "uint4", "mxfp8_e5m2", "nvfp4"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_make_their_block_nan(name, value):
    for tensor_scale in ("token", "fixed") if name == "nvfp4" else (None,):
        x = sample(9, 83).abs()
        x[5, 70] = value
        fmt = get_format(name, tensor_scale=tensor_scale)
        assert by_operations(x, fmt, torch.float32).isnan().any()
        assert_same(x, fmt, torch.float32)


STRIDED = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "every second column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "offset": lambda x: torch.cat([x[..., :3], x], -1)[..., 3:],
    "expanded": lambda x: x[:, :1].expand(x.shape),
    "pixels": lambda x: x.movedim(-1, 1).contiguous().movedim(1, -1),
    "four axes": lambda x: x.view(2, 2, 3, -1).movedim(-1, 1).contiguous().movedim(1, -1),
    "one token": lambda x: x[0, 0],
}


@pytest.mark.parametrize("case", STRIDED)
@pytest.mark.parametrize("name", ["int4", "nvfp4"])
def test_strides_are_read_without_a_copy(case, name):
    fmt = get_format(name, tensor_scale="token" if name == "nvfp4" else None)
    x = STRIDED[case](sample(12, 72).view(2, 6, 72))
    assert_same(x, fmt, torch.float32)


TRANSFORMS = {
    "rotation": (0.0, False, 64),
    "shift and smoothing": (0.171875, True, 0),
    "all": (0.171875, True, 16),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", TRANSFORMS)
def test_a_transform_before(case, dtype):
    """Powers of two, so that the order of the rotation's sums does not matter."""
    shift, smoothed, block = TRANSFORMS[case]
    g = torch.Generator().manual_seed(3)
    x = (torch.randint(-20, 21, (5, 192), generator=g) / 8).to(dtype)
    smooth = torch.rand(192, generator=g) + 0.5
    if block:
        smooth = torch.exp2(torch.randint(-2, 3, (192,), generator=g))
    signs = (torch.randint(0, 2, (192,), generator=g) * 2 - 1).to(torch.int8)
    transform = InputTransform(
        smooth.to(dtype) if smoothed else None, signs if block else None, block, shift
    )
    rotation = hadamard_matrix(block).to(DEVICE, dtype) if block else None
    moved = transform.to(DEVICE, dtype)
    before = Before(shift, moved.smooth_I, moved.signs_I, rotation)
    for fmt in (get_format("int4"), get_format("nvfp4", tensor_scale="token")):
        out = torch.empty(x.shape, dtype=dtype, device=DEVICE)
        assert supported(x.to(DEVICE), fmt, dtype, before)
        launch(x.to(DEVICE), [(fmt, out)], before)
        check(out, by_operations(transform.input(x), fmt, dtype), fmt.label)


PAIRS = {
    "one tile": ("int4", "int8", {}),
    "other blocks": ("nvfp4", "mxfp8_e4m3", {}),
    "a row and blocks": ("int8", "mxint8", {"block": "channel"}),
    "blocks that do not fit each other": ("int4", "mxint4", {"block": 48}),
    "a format without a kernel": ("int4", "fp16", {}),
    "searched scales": ("int8", "mxint4", {"clip": "mse"}),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_two_formats_into_strided_outputs(pair, monkeypatch):
    """As a layer writes both; without a GPU the operator takes the definition."""
    first, second, options = PAIRS[pair]
    formats = get_format(first, **options), get_format(second)
    formats = tuple(
        get_format("nvfp4", tensor_scale="token") if fmt.name == "nvfp4" else fmt for fmt in formats
    )
    x = sample(10, 200).view(2, 5, 200)
    wide = torch.full((2, 5, 216), 7.0, device=DEVICE)
    results = [(formats[0], wide[..., :200]), (formats[1], torch.empty(2, 5, 200, device=DEVICE))]
    wanted = fake_quantize_each(x, formats)
    fake_quantize_into(x.to(DEVICE), results)
    kernels = [pair for pair in results if supported(x.to(DEVICE), pair[0], torch.float32)]
    for _, out in kernels:
        out.fill_(-1)
    if kernels:
        launch(x.to(DEVICE), kernels)
    for (fmt, out), values in zip(results, wanted, strict=True):
        check(out, values, fmt.label)
    assert (wide[..., 200:] == 7).all()


def test_what_has_no_kernel():
    x = torch.zeros(2, 64)
    assert supported(x, get_format("int4"), torch.float32)
    for fmt in (
        get_format("fp16"), get_format("int4", clip="mse"), get_format("int8", block="tensor"),
    ):  # fmt: skip
        assert not supported(x, fmt, torch.float32)
    assert not supported(x.double(), get_format("int4"), torch.float32)
    rotated = Before(signs_I=torch.ones(64), rotation=torch.eye(64))
    assert supported(x, get_format("int4"), torch.float32, rotated)
    for fmt, before in (
        (get_format("int4", 48), rotated),  # its tiles have gaps
        (get_format("int4"), Before(rotation=torch.eye(8))),
        (get_format("nvfp4"), rotated),  # the scale of x is not that of the rotated x
    ):
        assert not supported(x, fmt, torch.float32, before)
    wide = torch.zeros(1, MAX_BLOCK + 1)
    assert not supported(wide, get_format("int4", "channel"), torch.float32)
    assert supported(wide, get_format("int4"), torch.float32)


def test_a_row_that_exceeds_a_tile_takes_its_scale_from_a_pass_before(monkeypatch):
    monkeypatch.setattr(fake, "MAX_BLOCK", 64)
    assert_same(sample(6, 200), get_format("nvfp4", tensor_scale="token"), torch.float32)


def test_a_kernel_with_other_values_than_the_definition_is_refused(monkeypatch):
    kind = get_format("int4"), torch.float16, torch.bfloat16, DEVICE
    probe.check_agreement(*kind)
    probe.check_agreement.cache_clear()
    monkeypatch.setattr(probe, "launch", lambda x, results: results[0][1].copy_(x))
    with pytest.raises(LoraqError, match=r"of 32768 values .*LORAQ_FUSED=0"):
        probe.check_agreement(*kind)
