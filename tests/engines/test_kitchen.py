"""The tensors of `comfy-kitchen` in comfy-kitchen's own code for a CPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from loraq.layers.linear import QuantizedLinear
from loraq.layouts.engine_linear import EngineLinear
from loraq.layouts.files import WEIGHTS
from loraq.layouts.targets import find_target
from tests.layouts.layers import difference, packed_layer, packed_source, rows

pytestmark = pytest.mark.engines
TARGET = find_target("comfy-kitchen")
CASES = {
    "signed": {},
    "unsigned": {"shift": True},
    "without smoothing": {"smooth": False},
    "without a branch": {"rank": 0},
    "wide": {"out": 64, "width": 384, "rank": 33, "seed": 3},
}


def kitchen_output(tensors, x, unsigned):
    """y of the layer "a" by comfy-kitchen's eager functions, which run on any device."""
    from comfy_kitchen.backends.eager import svdquant

    held = {name.removeprefix("a."): t for name, t in tensors.items() if name.startswith("a.")}
    dtype = held["weight_scale"].dtype
    raw = x.to(dtype)
    codes, scales, inner = svdquant.quantize_svdquant_w4a4(
        raw + svdquant._GELU_UNSIGNED_SHIFT if unsigned else raw,
        smooth=held["weight_smooth_factor"],
        lora_down=held["weight_proj_down"],
        act_unsigned=unsigned,
        lora_x=raw,
    )
    y = svdquant.scaled_mm_svdquant_w4a4(
        codes,
        held["weight"],
        scales,
        held["weight_scale"],
        inner,
        held["weight_proj_up"],
        held.get("bias"),
        act_unsigned=unsigned,
    )
    return y[: len(x)].float()


def written(layer, folder, dtype):
    TARGET.write(packed_source({"a": layer}, dtype), folder)
    return load_file(folder / WEIGHTS)


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
@pytest.mark.parametrize(
    ("dtype", "packed", "emulated"),
    [(torch.float16, 1e-2, 5e-4), (torch.bfloat16, 4e-2, 4e-3)],
    ids=["float16", "bfloat16"],
)
def test_the_reader_computes_what_was_packed_and_what_is_emulated(
    settings, dtype, packed, emulated, tmp_path
):
    layer = packed_layer(**settings)
    unsigned = bool(layer.transform.shift)
    x = rows(layer.weight.shape[1], after_gelu=unsigned)
    found = kitchen_output(written(layer, tmp_path, dtype), x, unsigned)
    engine = EngineLinear(TARGET.read(tmp_path).layers["a"])
    assert difference(found, QuantizedLinear(layer)(x)) < packed
    assert difference(engine(x), found) < emulated


def test_without_the_bias_term_of_the_shift_the_reader_is_wrong(tmp_path):
    layer, x = packed_layer(shift=True), rows(after_gelu=True)
    tensors = written(layer, tmp_path, torch.float16)
    right = partial(difference, expected=QuantizedLinear(layer)(x))
    assert right(kitchen_output(tensors, x, True)) < 1e-2
    tensors["a.bias"] = layer.bias_O.half()
    assert right(kitchen_output(tensors, x, True)) > 5e-2


def test_the_layout_of_its_tensors_is_the_package_s(tmp_path):
    """As `QuantizedTensor`s of the package, by which custom nodes read them."""
    from comfy_kitchen.tensor import QuantizedTensor
    from comfy_kitchen.tensor.svdquant_w4a4 import TensorCoreSVDQuantW4A4Layout as Layout

    layer = packed_layer(shift=True)
    tensors, x = written(layer, tmp_path, torch.float16), rows(after_gelu=True)
    out, width = layer.weight.shape
    parts = {name: tensors[f"a.weight_{name}"] for name in ("scale", "proj_down", "proj_up")}
    params = Layout.Params(
        **parts,
        smooth_factor=tensors["a.weight_smooth_factor"],
        act_unsigned=True,
        orig_dtype=torch.float16,
        orig_shape=(out, width),
    )
    weight = QuantizedTensor(tensors["a.weight"], Layout.__name__, params)
    named = {f"a.weight{end}" for end in Layout.state_dict_tensors(tensors["a.weight"], params)}
    assert named | {"a.bias"} == {name for name in tensors if name.startswith("a.")}
    y = torch.nn.functional.linear(x.half(), weight, tensors["a.bias"])
    assert torch.equal(y.float(), kitchen_output(tensors, x, True))
