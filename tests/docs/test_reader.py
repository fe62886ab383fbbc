"""The reader in docs/checkpoints.md reads what diffusers saves, and refuses all else."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from safetensors.torch import load_file, save_file
from torch import nn

from loraq.formats import Format, dequantize, fake_quantize, get_format, quantize
from loraq.formats.packing import unpack
from loraq.formats.table import EXPONENT_RULES, FORMATS, TENSOR_SCALES
from loraq.layers.tensors import OPERANDS, LayerTensors
from loraq.quantization.model import QuantizedModel
from loraq.transforms.hadamard import random_signs
from loraq.transforms.input_transform import GELU_SHIFT, InputTransform
from loraq.utils.assets import CHECKOUT

OUT, WIDTH, RANK = 20, 72, 21  # short last blocks, rows that end within a byte
WEIGHTS = "diffusion_pytorch_model.safetensors"
OPTIONS: dict[str, tuple[dict, ...]] = {
    "int": ({}, {"scale": "bf16", "block": "channel"}, {"block": 16, "clip": "mse"}),
    "uint": ({}, {"scale": "bf16"}),
    "nvfp": tuple({"tensor_scale": of} for of in TENSOR_SCALES),
    "float": ({},),
    "mx": tuple({"exponent": rule} for rule in EXPONENT_RULES),
}


def all_formats() -> list[Format]:
    """Every format of the table with each of its options."""
    return [
        get_format(name, **options)
        for name, spec in FORMATS.items()
        for options in OPTIONS["mx" if spec.family.startswith("mx") else spec.family]
    ]


def activation(fmt: Format) -> Format:
    """`fmt` with the scales of one token and without a search, which the reader refuses."""
    return replace(
        fmt, clip="none", tensor_scale="token" if not fmt.per_token else fmt.tensor_scale
    )


class Net(ModelMixin, ConfigMixin):
    """As many linear layers as there are formats."""

    @register_to_config
    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, OUT) for _ in range(count))


def packed_layers() -> dict[str, LayerTensors]:
    """A layer per format, each with two more formats in its branch, and one of every transform."""
    g, formats = torch.Generator().manual_seed(0), all_formats()
    smooth = (torch.rand(WIDTH, generator=g) + 0.5).bfloat16().float()
    transforms = itertools.cycle(
        [
            InputTransform(smooth_I=smooth, signs_I=random_signs(WIDTH, g), block=8),
            InputTransform(shift=GELU_SHIFT, smooth_I=smooth),
            InputTransform(),
        ]
    )

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g) * torch.rand(shape[-1], generator=g).add(0.01)

    made = {}
    for number, (weight, transform) in enumerate(zip(formats, transforms, strict=False)):
        left, right, inner = (formats[(number + step) % len(formats)] for step in (1, 5, 3))
        made[f"layers.{number}"] = LayerTensors(
            quantize(random(OUT, WIDTH), weight),
            activation(weight),
            transform,
            quantize(random(OUT, RANK), left),
            quantize(random(RANK, WIDTH), right),
            activation(inner),
            requantize_intermediate=number % 2 == 0,
            bias_O=random(OUT),
        )
    tensor = quantize(random(OUT, WIDTH), get_format("int8", block=-1))
    made["layers.0"] = LayerTensors(tensor, formats[0])
    return made


@pytest.fixture(scope="module")
def net() -> Net:
    layers = packed_layers()
    made = Net(len(layers))
    QuantizedModel(layers).apply(made)
    return made


@pytest.fixture(scope="module")
def folder(net, tmp_path_factory):
    path = tmp_path_factory.mktemp("reader") / "net"
    net.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def reader() -> ModuleType:
    """The page's reader as a module."""
    page = (CHECKOUT / "docs/checkpoints.md").read_text("utf-8")
    code = re.search(r'```python\n("""Read LoRaQ.*?)```', page, re.DOTALL)[1]
    assert {"numpy", "json", "pathlib"} == set(re.findall(r"^(?:import|from) (\w+)", code, re.M))
    module = ModuleType("reader")
    exec(code, vars(module))
    return module


def test_every_element_has_its_values(reader):
    for name, spec in FORMATS.items():
        if spec.element is not None:
            expected = np.array(spec.element.table(), np.float32)
            np.testing.assert_array_equal(reader.ELEMENTS[name], expected, name)


def test_codes_and_matrices_are_equal_to_the_bit(reader, net, folder):
    read = reader.Checkpoint(folder)
    for name in read.layers:
        tensors = net.get_submodule(name).tensors
        for operand in OPERANDS:
            packed = getattr(tensors, operand)
            if packed is None:
                assert operand not in read.layers[name]
                continue
            codes, values = read.matrix(name, operand)
            assert values.dtype == np.float32
            assert values.tobytes() == dequantize(packed).numpy().tobytes(), packed
            if codes is not None:
                expected = unpack(packed.codes, packed.format.bits, packed.shape[-1])
                np.testing.assert_array_equal(codes, expected.numpy(), str(packed))


def test_outputs_are_those_of_the_packed_layers(reader, net, folder):
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))
    x[0, 0] = 0
    x[1] *= 1e-3
    read = reader.Checkpoint(folder)
    for name in read.layers:
        layer = net.get_submodule(name)
        expected = layer(x).numpy()
        np.testing.assert_allclose(
            read.forward(name, x.numpy()), expected, 1e-5, 1e-5 * np.abs(expected).max(), name
        )


def test_activations_are_rounded_to_the_bit(reader):
    g = torch.Generator().manual_seed(2)
    x = torch.randn(50, WIDTH, generator=g) * 10 ** torch.randn(50, 1, generator=g)
    x[:20] = (x[:20] * 4).round() / 4  # ties
    x[0] = 0
    bad = torch.ones(3, WIDTH)
    bad[:, 3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    for fmt in map(activation, all_formats()):
        plain = {name: getattr(fmt, name) for name in reader.ENTRIES["format"]}
        found = reader.rounded(x.numpy(), plain)
        assert found.tobytes() == fake_quantize(x, fmt).numpy().tobytes(), fmt
        with np.errstate(invalid="ignore"):
            found = reader.rounded(bad.numpy(), plain)
        np.testing.assert_array_equal(found, fake_quantize(bad, fmt).numpy(), str(fmt))


def edited(section, **changes):
    def edit(folder):
        file = folder / "config.json"
        config = json.loads(file.read_text())
        place = config["quantization_config"]
        for name in section:
            place = place[name]
        place |= changes
        file.write_text(json.dumps(config))

    return edit


def stored(change):
    def edit(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edited((), version="2"), "version 2"),
        (edited((), quant_method="other"), "quant_method other"),
        (edited((), zero_points=True), "zero_points"),
        (edited(("layers", "layers.1"), rotation="left"), "rotation"),
        (edited(("layers", "layers.1", "transform"), permutation=[]), "permutation"),
        (edited(("formats", 0), name="int3"), "int3"),
        (stored(lambda t: t.pop("layers.1.left_codes")), "layers.1.left_codes is missing"),
        (stored(lambda t: t.update({"layers.1.zero": t["layers.1.bias"] + 1})), "layers.1.zero"),
        (
            stored(lambda t: t.update({"layers.1.bias": t["layers.1.bias"].half()})),
            r"layers.1.bias is F16 \(20,\), not F32 \(20,\)",
        ),
    ],
)
def test_what_the_reader_does_not_know_is_refused(reader, folder, tmp_path, edit, message):
    copy = shutil.copytree(folder, tmp_path / "net")
    edit(copy)
    with pytest.raises(ValueError, match=message):
        reader.Checkpoint(copy)
