"""Quantising a model: resume, sharing, accounting, data-freeness, and the layer's equation."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch.nn.functional import linear

from loraq.config import BranchConfig, FormatConfig, Recipe, RoundingConfig, TransformConfig
from loraq.errors import DiskFullError, LoraqError
from loraq.formats import dequantize, fake_quantize, get_format
from loraq.layers import backends as compute_module
from loraq.layers.linear import QuantizedLinear
from loraq.quantization.activations import Activations
from loraq.quantization.budget import branch_bits, planned_branch_bits, rank_for_budget
from loraq.quantization.group_file import load_group, save_group
from loraq.quantization.layer_errors import layer_errors
from loraq.quantization.quantizer import quantize_model
from loraq.transforms.input_transform import GELU_SHIFT
from loraq.utils.console import show_messages
from loraq.utils.files import TEMPORARY
from tests.damage import flip_bit
from tests.quantization.toy import Toy, toy_inputs, toy_layers

INT4, INT8, FP16 = (
    FormatConfig("int4", block=16),
    FormatConfig("int8", block=16),
    FormatConfig("fp16"),
)
O2 = Recipe(INT4, INT4, INT8, INT8, branch=BranchConfig(kind="loraq", rank=4))
RTN = replace(O2, branch=BranchConfig(kind="none"))
SVDQUANT = Recipe(
    INT4, INT4, FP16, FP16,
    transform=TransformConfig(smooth="search", shift=True),
    branch=BranchConfig(kind="alternating", select="output", rank=4),
)  # fmt: skip


def quantized(recipe, inputs=None, **options):
    model = Toy()
    return model, quantize_model(
        model, toy_layers(), recipe, Activations(rows=inputs), progress=None, **options
    )


def test_the_modules_forward_is_the_equation():
    model, q = quantized(O2)
    tensors = q.layers["blocks.1.down"]
    x = torch.randn(2, 5, 64)
    int4, int8 = get_format("int4", block=16), get_format("int8", block=16)
    branch = fake_quantize(x, int8) @ dequantize(tensors.right).T
    expected = (
        linear(fake_quantize(x, int4), dequantize(tensors.weight))
        + fake_quantize(branch, int8) @ dequantize(tensors.left).T
        + model.blocks[1]["down"].bias
    )
    assert torch.allclose(QuantizedLinear(tensors)(x), expected, atol=1e-5)
    assert torch.allclose(tensors.forward(x), expected, atol=1e-5)
    kept = replace(tensors, requantize_intermediate=False)
    assert not torch.allclose(kept.forward(x), expected, atol=1e-5)


def test_sixteen_bit_activations_leave_the_effective_weight():
    """Qa = identity: y = x·Ŵᵀ + b for any transform; checks effective_weight and folding."""
    recipe = replace(O2, activation=FormatConfig("bf16"), branch_activation=FormatConfig("bf16"),
                     transform=TransformConfig(hadamard=16))  # fmt: skip
    model, q = quantized(recipe)
    tensors = q.layers["blocks.0.up"]
    x = torch.randn(6, 32)
    exact = linear(x, tensors.effective_weight(), model.blocks[0]["up"].bias)
    assert (tensors.forward(x) - exact).norm() / exact.norm() < 0.01


def test_shift_reads_unsigned_codes_and_folds_into_the_bias():
    recipe = replace(RTN, transform=TransformConfig(shift=True))
    model, q = quantized(recipe)
    down, up = q.layers["blocks.0.down"], q.layers["blocks.0.up"]
    assert down.activation.name == "uint4" and up.activation.name == "int4"
    w = model.blocks[0]["down"].weight
    expected = model.blocks[0]["down"].bias - GELU_SHIFT * w.sum(1)
    assert torch.allclose(down.bias_O, expected, atol=1e-5)
    x = torch.nn.functional.gelu(torch.randn(200, 64))
    y = linear(x, w, model.blocks[0]["down"].bias)
    signed = quantized(RTN)[1].layers["blocks.0.down"]
    assert (down.forward(x) - y).norm() < (signed.forward(x) - y).norm()


def test_apply_and_revert():
    model, q = quantized(O2)
    x = torch.randn(1, 16, 32)
    with torch.no_grad():
        before = model(x)
        q.apply(model)
        during = model(x)
        q.revert(model)
        assert not torch.equal(during, before)
        assert torch.equal(model(x), before)


def test_layers_of_one_input_quantise_it_once(monkeypatch):
    """q, k and v share x̃, its codes and x·Rᵀ; an input modified in place is quantised again."""
    toy, layers = Toy(), toy_layers()
    model = quantize_model(toy, layers, O2, progress=None)
    model.apply(toy)
    readers = [toy.get_submodule(f"blocks.0.to_{name}") for name in "qkv"]
    x = torch.randn(4, 32)
    alone = [reader.tensors.forward(x) for reader in readers]
    calls = []
    made = compute_module.quantize_input
    monkeypatch.setattr(
        compute_module, "quantize_input", lambda x, *a, **k: calls.append(x) or made(x, *a, **k)
    )
    for mode in (torch.no_grad, torch.inference_mode):
        calls.clear()
        with mode():
            shared = [reader(x) for reader in readers]
            assert len(calls) == 1 and readers[0].shared._state is None
        for one, other in zip(shared, alone, strict=True):
            assert torch.equal(one, other)
    with torch.no_grad():
        readers[0](x)
        x += 1
        assert torch.equal(readers[1](x), readers[1].tensors.forward(x))


def test_the_budget_is_what_is_stored():
    _, q = quantized(replace(O2, branch=BranchConfig(kind="loraq", budget=2.0)))
    rank, bits = planned_branch_bits(
        toy_layers(), replace(O2, branch=BranchConfig(kind="loraq", budget=2.0))
    )
    assert q.rank == rank and q.branch_bits_per_weight == pytest.approx(bits)
    assert bits <= 2.0
    by_hand = sum(
        t.weight.codes.numel()
        + t.weight.scale.numel() * 2
        + t.left.codes.numel()
        + t.left.scale.numel() * 2
        for t in q.layers.values()
    )
    rights = {id(t.right): t.right for t in q.layers.values()}
    by_hand += sum(r.codes.numel() + r.scale.numel() * 2 for r in rights.values())
    assert q.nbytes == by_hand
    assert len(rights) == 8  # q, k, v of both blocks share one


def test_a_bigger_rank_does_not_fit_the_budget():
    shapes = [(96, 32), (32, 32), (64, 32), (32, 64)]
    fmt = get_format("int8")
    rank = rank_for_budget(shapes, 1.5, fmt)
    weights = sum(o * i for o, i in shapes)
    assert branch_bits(shapes, rank, fmt) <= 1.5 * weights < branch_bits(shapes, rank + 1, fmt)
    with pytest.raises(LoraqError, match="too small for rank 1"):
        rank_for_budget(shapes, 0.01, fmt)


def test_rank_above_the_limit_is_refused():
    with pytest.raises(LoraqError, match=r"rank=33 is outside 1\.\.32"):
        quantized(replace(O2, branch=BranchConfig(kind="loraq", rank=33)))


class Untouchable(Mapping):
    """A mapping that fails the test when it is read."""

    def __getitem__(self, key):
        raise AssertionError(f"a data-free method read activations: {key}")

    __iter__ = __len__ = __getitem__


@pytest.mark.parametrize("kind,objective,start", [
    ("none", "shape", "weight"), ("svd", "compensate", "error"), ("alternating", "shape", "zero"),
    ("loraq", "shape", "weight"), ("loraq", "compensate", "error"),
])  # fmt: skip
def test_data_free_methods_never_touch_activations(kind, objective, start):
    rank = None if kind == "none" else 4
    branch = BranchConfig(kind=kind, objective=objective, start=start, rank=rank)
    recipe = replace(O2, branch=branch, transform=TransformConfig(hadamard=16))
    assert not recipe.needs_calibration
    model = Toy()
    read = Activations(Untouchable(), Untouchable(), Untouchable())
    quantize_model(model, toy_layers(), recipe, read, progress=None)


def test_calibrated_methods_name_missing_activations():
    with pytest.raises(LoraqError, match="no calibration rows"):
        quantized(SVDQUANT)


def test_svdquant_beats_rounding_on_outputs_of_fresh_inputs():
    model = Toy()
    inputs, fresh = toy_inputs(model), toy_inputs(model, seed=5)
    errors = {}
    for name, recipe in {"svdquant": SVDQUANT, "rtn": RTN}.items():
        q = quantize_model(model, toy_layers(), recipe, Activations(inputs), progress=None)
        rows = layer_errors(q, model, toy_layers(), fresh)
        errors[name] = sum(r["output_error"] for r in rows) / len(rows)
    assert errors["svdquant"] < 0.8 * errors["rtn"]


def same_layers(a, b) -> bool:
    for name in a:
        for part in ("weight", "left", "right"):
            x, y = getattr(a[name], part), getattr(b[name], part)
            if (x is None) != (y is None):
                return False
            if x is not None:
                pairs = zip(x.tensors().values(), y.tensors().values(), strict=True)
                if not all(torch.equal(s, t) for s, t in pairs):
                    return False
    return True


def test_a_full_disk_is_reported(tmp_path, monkeypatch):
    """Raises safetensors' exact error message."""

    def full(_tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(DiskFullError, match=r"Disk full while writing .*Free some"):
        quantize_model(Toy(), toy_layers(), RTN, None, tmp_path, progress=None)
    assert not any(tmp_path.iterdir())


def test_another_bias_is_another_layer(tmp_path):
    """A finished group contains biases, so other biases change its fingerprint."""
    model = Toy()
    quantize_model(model, toy_layers(), RTN, None, tmp_path, progress=None)
    model.get_submodule(toy_layers()[0].name).bias.data += 5
    with pytest.raises(LoraqError, match="another recipe, model"):
        quantize_model(model, toy_layers(), RTN, None, tmp_path, progress=None)


@pytest.mark.parametrize("kind", ["weight", "bias"])
@pytest.mark.parametrize("folder", [False, True])
def test_a_layer_that_is_not_finite_is_named(kind, folder, tmp_path):
    """A NaN was blamed on the branch; an infinite bias was stored."""
    toy = Toy()
    toy.blocks[1]["up"].get_parameter(kind).data[3] = torch.inf
    with pytest.raises(LoraqError, match=f"'blocks.1.up.{kind}': .* NaN or infinite"):
        quantize_model(toy, toy_layers(), O2, None, tmp_path if folder else None, None)


def test_layers_compute_on_the_device_of_their_inputs():
    """Packed layers are loaded to the CPU, their errors are measured on the model's device."""
    recipe = replace(O2, transform=TransformConfig(smooth="fixed", hadamard=16))
    _, made = quantized(recipe, toy_inputs(Toy()))
    for tensors in made.layers.values():
        there = tensors.to("meta")
        x_TI = torch.empty(3, tensors.weight.shape[1], device="meta")
        assert there.forward(x_TI).device.type == "meta"
        assert there.effective_weight().device.type == "meta"
        assert there.weight.nbytes == tensors.weight.nbytes


def test_smoothing_is_searched_without_a_branch_too():
    recipe = replace(SVDQUANT, branch=BranchConfig(kind="none"))
    _, made = quantized(recipe, toy_inputs(Toy()))
    assert all(tensors.left is None for tensors in made.layers.values())
    assert all(tensors.transform.smooth_I is not None for tensors in made.layers.values())


def test_finished_groups_are_kept_and_damaged_ones_remade(tmp_path, capsys):
    show_messages()
    model = Toy()
    inputs = toy_inputs(model)
    recipe = replace(SVDQUANT, branch_weight=INT8, branch_activation=INT8)
    first = quantize_model(
        model, toy_layers(), recipe, Activations(inputs), tmp_path, progress=None
    )
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 4 and not list(tmp_path.glob(f".*{TEMPORARY}"))
    times = {f: f.stat().st_mtime_ns for f in files}
    files[0].write_bytes(files[0].read_bytes()[:100])
    files[1].unlink()
    flip_bit(files[2], -9)  # in the tensors: the file can be read
    again = quantize_model(
        model, toy_layers(), recipe, Activations(inputs), tmp_path, progress=None
    )
    assert same_layers(first.layers, again.layers)
    assert again.nbytes == first.nbytes and again.rank == first.rank
    assert [f.stat().st_mtime_ns == times[f] for f in files] == [False, False, False, True]
    said = capsys.readouterr().err
    for file in (files[0], files[2]):
        assert f"'{file}' does not match its checksum; it is deleted and made" in said
    x = torch.randn(2, 16, 32)
    with torch.no_grad():
        outputs = []
        for q in (first, again):
            q.apply(model)
            outputs.append(model(x))
            q.revert(model)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("damaged", ["self_out*.safetensors", "self_out*.seconds", ".sha256/*out*"])
def test_a_group_that_does_not_match_its_checksum_is_made_again(tmp_path, capsys, damaged):
    """The last case: an older version saved the group, without a checksum."""
    show_messages()
    _, first = quantized(RTN, checkpoint_dir=tmp_path)
    for file in tmp_path.glob(damaged):
        file.unlink() if file.parent != tmp_path else flip_bit(file, -2)
    _, again = quantized(RTN, checkpoint_dir=tmp_path)
    assert same_layers(first.layers, again.layers)
    said = capsys.readouterr().err
    assert "self_out" in said and said.count("made again") == 1
    times = [info["seconds"] for info in first.info.values()]
    assert [info["seconds"] in times for info in again.info.values()].count(False) == 1


def test_temporary_files_of_dead_processes_are_deleted(tmp_path):
    old, new = (tmp_path / f".{name}{TEMPORARY}" for name in ("old", "new"))
    for path in (old, new):
        path.write_text("half")
    os.utime(old, (0, 0))
    quantized(RTN, checkpoint_dir=tmp_path)
    assert not old.exists() and new.exists()


def test_a_folder_of_another_recipe_is_refused(tmp_path):
    quantized(RTN, checkpoint_dir=tmp_path)
    quantized(RTN, checkpoint_dir=tmp_path)
    with pytest.raises(LoraqError, match="another recipe"):
        quantized(O2, checkpoint_dir=tmp_path)
    with pytest.raises(LoraqError, match="another recipe"):
        quantize_model(Toy(seed=1), toy_layers(), RTN, None, tmp_path, progress=None)


@pytest.mark.parametrize("weight", [FormatConfig("nvfp4"), FormatConfig("int4", block="tensor")])
def test_stacked_layers_are_stored_as_they_were_solved(weight, tmp_path):
    """One scale per tensor means one for the stack of q, k, v; the stored rows must agree."""
    recipe = replace(O2, weight=weight, branch=BranchConfig(kind="svd", rank=4))
    _, q = quantized(recipe)
    notes = next(n for name, n in q.info.items() if name.startswith("self_q"))
    model, errors = Toy(), []
    for b in range(2):
        names = [f"blocks.{b}.to_{n}" for n in "qkv"]
        w = torch.cat([model.get_submodule(n).weight for n in names])
        estimate = torch.cat([q.layers[n].effective_weight() for n in names])
        errors.append((w - estimate).norm() / w.norm())
    assert sum(errors).item() / 2 == pytest.approx(notes["losses"][-1], rel=1e-4)
    save_group(tmp_path / "g.safetensors", q.layers, {})
    loaded, _ = load_group(tmp_path / "g.safetensors")
    name = "blocks.1.to_k"
    assert torch.equal(loaded[name].effective_weight(), q.layers[name].effective_weight())


def test_a_groups_file_is_reproducible(tmp_path):
    """safetensors orders metadata arbitrarily; seconds are stored in a separate file."""
    _, q = quantized(O2)
    for run in range(3):
        notes = {"smoothing": {"é": [0.5, "\n"]}, "losses": [0.1], "seconds": run / 3}
        save_group(tmp_path / f"{run}.safetensors", q.layers, notes)
        assert load_group(tmp_path / f"{run}.safetensors")[1] == notes
    assert len({path.read_bytes() for path in tmp_path.glob("*.safetensors")}) == 1
    header = (tmp_path / "0.safetensors").read_bytes()[8:]
    assert header.index(b'"info"') < header.index(b'"layers"') < header.index(b'"layout"')


def test_a_shifted_layer_keeps_the_requested_block():
    recipe = replace(RTN, activation=FormatConfig("int4", block="token"),
                     transform=TransformConfig(shift=True))  # fmt: skip
    _, q = quantized(recipe)
    assert q.layers["blocks.0.down"].activation.label == "uint4 channel"


def test_activations_have_no_scale_beyond_a_token():
    with pytest.raises(LoraqError, match=r"quant\.activation.*other images"):
        quantized(replace(RTN, activation=FormatConfig("int4", block=-1)))
    assert replace(RTN, activation=FormatConfig("nvfp4")).formats()["activation"].per_token


def test_units_behind_a_gelu_are_quantised_apart_from_others():
    """Blocks of two lists may have one role and shape: the shift belongs to some of them alone."""
    layers = [layer for layer in toy_layers() if layer.role == "ff_down"]
    layers[1] = replace(layers[1], after_gelu=False)
    recipe = replace(RTN, transform=TransformConfig(shift=True))
    model = quantize_model(Toy(), layers, recipe, progress=None)
    shifts = [model.layers[layer.name].transform.shift for layer in layers]
    assert shifts[0] > 0 == shifts[1]


def test_settings_without_effect_are_refused():
    for mistake in (
        {"kind": "svd", "solver": "adam"},
        {"kind": "loraq", "select": "output"},
        {"kind": "none", "rank": 4},
        {"kind": "alternating", "rotation": "random"},
    ):
        with pytest.raises(LoraqError, match="no effect"):
            BranchConfig(**mistake)


def test_a_foreign_layout_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors", metadata={"layout": "9"})
    with pytest.raises(LoraqError, match="layout '9'"):
        load_group(tmp_path / "x.safetensors")


def test_numbers_do_not_depend_on_how_layers_are_grouped(monkeypatch):
    _, together = quantized(replace(O2, transform=TransformConfig(hadamard=16)))
    monkeypatch.setattr("loraq.quantization.grouping.MAX_GROUP_ELEMENTS", 1)
    _, apart = quantized(replace(O2, transform=TransformConfig(hadamard=16)))
    assert len(apart.info) > len(together.info)
    for name, tensors in together.layers.items():
        a, b = tensors.effective_weight(), apart.layers[name].effective_weight()
        assert (a - b).norm() / a.norm() < 0.02


def test_capture_is_bounded_repeatable_and_of_the_right_layer():
    model = Toy()
    inputs = toy_inputs(model, rows=10)
    assert set(inputs) == {layer.shares_input for layer in toy_layers()}
    assert all(x.shape[0] == 10 and x.dtype == torch.float16 for x in inputs.values())
    again = toy_inputs(model, rows=10)
    assert all(torch.equal(inputs[k], again[k]) for k in inputs)
    assert inputs["blocks.0.down"].shape[1] == 64 and inputs["blocks.0.down"].min() > -0.2
    assert not model.blocks[0]["up"]._forward_pre_hooks


def test_unknown_rounding_raises():
    with pytest.raises(LoraqError, match="nearest"):
        quantized(replace(RTN, rounding=RoundingConfig(kind="neares")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_model_is_emulated_in_float32_on_a_cpu(dtype):
    """Rounded once, at the end of the layer, including the transform."""
    model, made = quantized(replace(O2, transform=TransformConfig(hadamard=16)))
    made.apply(model)
    layer = next(m for m in model.modules() if isinstance(m, QuantizedLinear))
    x = torch.randn(7, layer.in_features, generator=torch.Generator().manual_seed(3)).to(dtype)
    found = layer(x)
    assert found.dtype == dtype
    assert torch.equal(found, layer.tensors.forward(x).to(dtype))
