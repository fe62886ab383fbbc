"""get_format's defaults and errors, labels, sizes, and the agreement of docs/formats.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loraq.errors import LoraqError
from loraq.formats import FORMATS, QuantizedTensor, dequantize, get_format, quantize, stored_bits
from loraq.formats.elements import IntegerElement
from loraq.formats.table import FormatSpec

PAGE = Path(__file__).parents[2] / "docs" / "formats.md"


def test_defaults():
    fmt = get_format("int4")
    assert (fmt.block, fmt.scale, fmt.exponent, fmt.clip) == (64, "fp16", "floor", "none")
    assert get_format("mxfp4_e2m1").block == 32 and get_format("nvfp4").tensor_scale == "tensor"
    assert get_format("int8", block="token") == get_format("int8", block="channel")
    assert get_format("int8", block="channel").block is None
    assert get_format("int8", block="tensor") == get_format("int8", block=-1)
    assert hash(fmt) == hash(get_format("int4", block=64))


@pytest.mark.parametrize(
    ("name", "options", "label"),
    [
        ("int4", {}, "int4 g64"),
        ("int8", {"block": "channel", "scale": "bf16"}, "int8 channel bf16"),
        ("int8", {"block": -1}, "int8 tensor"),
        ("mxfp4_e2m1", {"exponent": "ceil", "clip": "mse"}, "mxfp4_e2m1 ceil clip-mse"),
        ("mxint8", {"block": 16}, "mxint8 g16"),
        ("nvfp4", {"tensor_scale": "token"}, "nvfp4 token"),
        ("bf16", {}, "bf16"),
    ],
)
def test_labels(name, options, label):
    assert get_format(name, **options).label == label


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("int44", {}, "int4"),
        ("mxfp4", {}, "mxfp4_e2m1"),
        ("int4", {"block": 0}, "block=0"),
        ("int4", {"block": -2}, "at least 1"),
        ("int4", {"block": "chanel"}, "'channel'"),
        ("int4", {"block": 1.5}, "block=1.5"),
        ("int4", {"block": True}, "block=True"),
        ("mxint8", {"block": "tensor"}, "block='tensor'"),
        ("nvfp4", {"block": -1}, "block=-1"),
        ("bf16", {"block": 32}, "no effect"),
        ("int4", {"scale": "e8m0"}, "'fp16' or 'bf16'"),
        ("int4", {"exponent": "ceil"}, "exponent='ceil'"),
        ("mxint8", {"exponent": "nearest"}, "'rceil'"),
        ("mxint8", {"scale": "fp16"}, "'e8m0'"),
        ("mxint8", {"clip": "max"}, "'mse'"),
        ("fp16", {"clip": "mse"}, "clip='mse'"),
        ("int4", {"tensor_scale": "token"}, "tensor_scale='token'"),
        ("nvfp4", {"tensor_scale": "row"}, "'token'"),
    ],
)
def test_errors_name_value_and_remedy(name, options, words):
    with pytest.raises(LoraqError, match=words):
        get_format(name, **options)


@pytest.mark.parametrize(("bits", "element"), [(5, 5), (4, 5), (8, 10), (16, 8)])
def test_elements_that_do_not_fit_into_packed_codes_raise(bits, element):
    with pytest.raises(LoraqError, match=rf"{bits} bits with an element of {element}.*4, 6, 8"):
        FormatSpec("int", bits, IntegerElement(element), 64, ("fp16",), "a test")
    FormatSpec("int", 8, IntegerElement(5), 64, ("fp16",), "a smaller element fits")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(5600,), (3, 10), (2, 3, 38), (4, 1), (7, 65)])
def test_sizes_equal_the_stored_tensors_and_round_trip(name, shape):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    options = [{}, {"block": "channel"}] if FORMATS[name].family != "float" else [{}]
    options += [{"tensor_scale": "token"}, {"tensor_scale": "fixed"}] if name == "nvfp4" else []
    options += [{"block": "tensor"}] if FORMATS[name].family == "int" else []
    for option in options:
        fmt = get_format(name, **option)
        stored = quantize(x, fmt)
        assert stored_bits(shape, fmt) == 8 * stored.nbytes
        again = QuantizedTensor.from_tensors(stored.tensors(), shape, fmt)
        assert torch.equal(dequantize(again), dequantize(stored))
        assert dequantize(stored).shape == shape


def test_repr_is_one_line():
    stored = quantize(torch.randn(6, 100), get_format("int4"))
    assert repr(stored) == "QuantizedTensor(int4 g64, shape=(6, 100), nbytes=324)"


def test_layout_of_a_weight():
    stored = quantize(torch.randn(6, 100), get_format("int4"))
    assert stored.codes.shape == (6, 50) and stored.codes.dtype == torch.uint8
    assert stored.scale.shape == (6, 2) and stored.scale.dtype == torch.float16
    stored = quantize(torch.randn(6, 100), get_format("mxfp6_e2m3"))
    assert stored.codes.shape == (6, 75) and stored.scale.shape == (6, 4)
    assert stored.scale.dtype == torch.uint8


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("int4", {}),
        ("int8", {"block": "channel"}),
        ("int8", {"block": "tensor"}),
        ("mxfp6_e3m2", {}),
        ("nvfp4", {}),
        ("nvfp4", {"tensor_scale": "token"}),
        ("bf16", {}),
    ],
)
def test_some_rows_of_a_stored_matrix(name, options):
    stored = quantize(torch.randn(7, 70), get_format(name, **options))
    for rows in (slice(0, 3), slice(3, None), slice(2, 3)):
        part = stored.rows(rows)
        assert torch.equal(dequantize(part), dequantize(stored)[rows])
        assert part.shape == dequantize(part).shape


def rows_of_the_page() -> dict[str, list[str]]:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:3] == "| `"]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0].strip("`"): row for row in cells if row[0].strip("`") in FORMATS}


def test_the_page_agrees_with_the_table():
    page = rows_of_the_page()
    assert set(page) == set(FORMATS)
    for name, spec in FORMATS.items():
        _, element, block, scale, largest, bits = page[name]
        assert scale == spec.scales[0]
        assert block == (str(spec.block) if spec.block else "–")
        fmt = get_format(name, tensor_scale="fixed" if name == "nvfp4" else None)
        assert float(bits) == stored_bits((3, 5760), fmt) / 3 / 5760
        if spec.element is None:
            continue
        assert float(largest) == spec.element.maximum
        if spec.family in ("mxfp", "nvfp"):
            widths = spec.element.exponent_bits, spec.element.mantissa_bits
            assert element == "E{}M{}".format(*widths)
        else:
            code, _, divisor = element.removeprefix("integer ").partition(" / ")
            low, high = code.replace("−", "-").split("..")
            assert int(high) == spec.element.maximum_code
            assert int(low) == (-int(high) if spec.element.signed else 0)
            assert int(divisor or 1) == 2**spec.element.fraction_bits


def test_the_decoder_on_the_page_decodes():
    x = torch.randn(1, 70, generator=torch.Generator().manual_seed(0))
    stored = quantize(x, get_format("mxfp4_e2m1"))
    start = PAGE.read_text(encoding="utf-8").index("    E2M1 = [")
    text = PAGE.read_text(encoding="utf-8")[start:].split("\n\n")[0]
    program = "\n".join(line[4:] for line in text.splitlines()) + "\n    out.append(value)"
    out: list[float] = []
    names = {"codes": stored.codes[0].tolist(), "scale": stored.scale[0].tolist(), "count": 70}
    exec(program, {**names, "out": out})
    assert torch.equal(torch.tensor([out]), dequantize(stored))
