"""Every method and format on the simulated device: the codes of the CPU, and few waits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from loraq.branches.loraq import PATIENCE
from loraq.compose import load_rows
from loraq.config import BranchConfig, FormatConfig, Recipe, RoundingConfig, TransformConfig
from loraq.errors import LoraqError
from loraq.formats.table import FORMATS
from loraq.models import Layer
from loraq.quantization import fingerprint, grouping
from loraq.quantization.activations import Activations
from loraq.quantization.calibration import InputCapture, MomentCapture
from loraq.quantization.group_file import load_group, save_group
from loraq.quantization.model import QuantizedModel
from loraq.quantization.quantizer import quantize_model
from loraq.utils import batch_invariance
from loraq.utils.assets import CHECKOUT
from tests.quantization.toy import Toy, toy_layers
from tests.simulated import Counts, simulated_cuda

METHODS = sorted(path.stem for path in (CHECKOUT / "conf/method").glob("*.yaml"))
RANK = 4
INT4 = FormatConfig("int4", block=16)
LAYERS = [layer for layer in toy_layers() if layer.role not in ("self_out", "ff_up")]
"""Two groups of two units; one unit is a stack of q, k and v, the other follows a GELU."""
ONE = [layer for layer in toy_layers() if layer.name == "blocks.1.down"]
O2 = Recipe(INT4, INT4, INT4, INT4, branch=BranchConfig(kind="loraq", rank=RANK))


@dataclass
class Made:
    """What one device made: the packed layers, the outputs of two forwards, the counts."""

    model: QuantizedModel
    outputs: list[torch.Tensor]
    quantizing: Counter[tuple[str, str]]
    second_forward: Counts


def captured(model: Toy, layers: Sequence[Layer], x: torch.Tensor) -> Activations:
    """Rows and moments of `model`'s inputs, captured on its device."""
    with InputCapture(model, layers, 64, 2, 0) as rows:
        model(x), model(x + 1)
    with MomentCapture(model, layers) as moments:
        model(x), model(x + 1)
    return Activations(rows.inputs(), moments.moments())


@torch.no_grad()
def made_on(
    device: str,
    recipe: Recipe,
    counts: Counts,
    layers: Sequence[Layer] = LAYERS,
    folder: Path | None = None,
) -> Made:
    model = Toy().to(device)
    x = torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(0)).to(device)
    activations = captured(model, layers, x)
    counts.reset()
    quantized = quantize_model(model, layers, recipe, activations, folder, progress=None)
    quantizing = counts.waits.copy()
    quantized.apply(model)
    outputs = [model(x)]
    counts.reset()
    outputs.append(model(x))
    return Made(quantized, outputs, quantizing, replace(counts, waits=counts.waits.copy()))


def same_on_both(recipe: Recipe, layers: Sequence[Layer] = LAYERS) -> Made:
    """Quantise on the CPU and on the device; the results must be equal."""
    here = made_on("cpu", recipe, Counts(), layers)
    with simulated_cuda() as device:
        there = made_on("cuda", recipe, device, layers)
        counts = there.quantizing, device.waits.copy(), device.copies.copy()
        for name, tensors in here.model.layers.items():
            other = there.model.layers[name]
            for part in ("weight", "left", "right"):
                packed, moved = getattr(tensors, part), getattr(other, part)
                for one, two in zip(_stored(packed), _stored(moved), strict=True):
                    assert two.is_cuda and torch.equal(one, two.cpu()), (name, part)
        for one, two in zip(here.outputs, there.outputs, strict=True):
            assert torch.equal(one, two.cpu())
    there.quantizing, there.second_forward.waits, there.second_forward.copies = counts
    return there


def _stored(packed) -> list[torch.Tensor]:
    return [] if packed is None else list(packed.tensors().values())


def method_recipe(method: str) -> Recipe:
    recipe = load_rows([f"method={method}", "device=cpu"])[-1].quant
    if recipe.branch.kind != "none":
        steps = {"steps": 4} if recipe.branch.kind in ("loraq", "alternating") else {}
        recipe = replace(recipe, branch=replace(recipe.branch, rank=RANK, **steps))
    return replace(recipe, statistics="activations")


@pytest.mark.parametrize("method", [name for name in METHODS if name != "reference"])
def test_a_method_gives_the_codes_of_the_cpu(method):
    made = same_on_both(method_recipe(method))
    assert not made.second_forward.waits and not made.second_forward.copies


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_gives_the_codes_of_the_cpu(name):
    fmt = FormatConfig(name)
    made = same_on_both(Recipe(fmt, fmt, fmt, fmt, branch=BranchConfig(kind="svd", rank=RANK)), ONE)
    assert not made.second_forward.waits and not made.second_forward.copies


def rounds_recipes() -> dict[str, tuple[Recipe, int]]:
    """Solver → (recipe, waits that a round of it may take: for the SVD, and for its end)."""

    def o2(**branch) -> Recipe:
        return replace(O2, branch=replace(O2.branch, tolerance=1e-9, **branch))

    loftq = BranchConfig(kind="alternating", start="zero", rank=RANK, tolerance=1e-9)
    svdquant = BranchConfig(kind="alternating", select="output", rank=RANK)
    return {
        "alternation": (o2(), 0),
        "compensate": (o2(objective="compensate", start="error"), 0),
        "adam": (o2(solver="adam"), 0),
        "soft adam": (o2(solver="adam", gradient="soft"), 0),
        "caldera": (o2(weighting="full", start="error"), 0),
        "loftq": (replace(O2, branch=loftq), 2),
        "svdquant": (replace(O2, branch=svdquant), 3),
    }


@pytest.mark.parametrize("solver", rounds_recipes())
def test_a_round_of_a_solver_does_not_wait(solver):
    """What a solver waits for does not grow with its rounds, except for decompositions."""
    recipe, each = rounds_recipes()[solver]
    waits = {}
    for steps in (2, 4):
        with simulated_cuda() as device:
            given = replace(recipe, branch=replace(recipe.branch, steps=steps))
            made = made_on("cuda", given, device, ONE)
            # the flag of the round before: the device has this round's work
            waits[steps] = {k: n for k, n in made.quantizing.items() if k[0] != "event"}
    assert sum(waits[4].values()) - sum(waits[2].values()) <= 2 * each, waits


def test_a_chunk_of_gptq_does_not_wait():
    waits = {}
    for block in (16, 64):
        rounding = RoundingConfig(kind="gptq", block=block)
        with simulated_cuda() as device:
            made = made_on(
                "cuda", replace(O2, branch=BranchConfig(), rounding=rounding), device, ONE
            )
            waits[block] = made.quantizing
    assert waits[16] == waits[64]


def test_candidates_of_the_smoothing_search_wait_for_their_svd_alone():
    search = TransformConfig(smooth="search", shift=True)
    with simulated_cuda() as device:
        rtn = made_on("cuda", replace(O2, transform=search, branch=BranchConfig()), device, ONE)
    assert rtn.quantizing.total() < 39, "39 candidates"
    one = replace(O2.branch, steps=1)
    with simulated_cuda() as device:
        found = made_on("cuda", replace(O2, transform=search, branch=one), device, ONE)
    others = Counter({k: n for k, n in found.quantizing.items() if k[0] != "linalg_eigh"})
    assert found.quantizing.total() - others.total() == 39 + 1
    assert others.total() < 39


@pytest.mark.parametrize("method", ["loraq_best", "caldera", "svdquant"])
def test_a_group_waits_a_bounded_number_of_times(method):
    """Checks, scales and packed tensors: not more than 20 waits a layer, beside decompositions."""
    with simulated_cuda() as device:
        made = made_on("cuda", method_recipe(method), device)
    others = Counter({k: n for k, n in made.quantizing.items() if "linalg" not in k[0]})
    assert others.total() <= 20 * len(LAYERS), others


def test_groups_on_a_gpu_are_larger_and_give_the_same_codes(monkeypatch):
    """Of a method that is not chaotic; in others, a library may sum in another order."""
    recipe = Recipe(INT4, INT4, INT4, INT4, branch=BranchConfig(kind="svd", rank=RANK))
    monkeypatch.setattr(grouping, "MAX_GROUP_ELEMENTS", 1)
    apart = made_on("cpu", recipe, Counts())
    with simulated_cuda() as device:
        together = made_on("cuda", recipe, device)
        assert len(apart.model.info) == 4 and len(together.model.info) == 2
        for name, tensors in apart.model.layers.items():
            codes = together.model.layers[name].weight.codes
            assert torch.equal(tensors.weight.codes, codes.cpu())


@pytest.mark.parametrize("memory,units", [(80, 32 << 20), (24, 16 << 20), (1, 5 << 20)])
def test_the_size_of_groups_follows_from_the_gpus_model(memory, units):
    """Not from its free memory: what one GPU model makes has one key."""
    with simulated_cuda(memory=memory << 30, free=1):
        assert grouping.group_elements(torch.device("cuda")) == units
    assert grouping.group_elements(torch.device("cpu")) == 5 << 20


def test_a_quantisation_is_resumed_on_the_device_and_with_other_groups(tmp_path, monkeypatch):
    """Finished groups are read onto the device; groups of another size are made again."""
    recipe = replace(O2, branch=BranchConfig())
    monkeypatch.setattr(grouping, "MAX_GROUP_ELEMENTS", 1)
    with simulated_cuda() as device:
        first = made_on("cuda", recipe, device, folder=tmp_path)
        files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
        again = made_on("cuda", recipe, device, folder=tmp_path)
        assert files == {path: path.stat().st_mtime_ns for path in files}
        read, made = (m.model.layers["blocks.0.down"].weight.codes for m in (again, first))
        assert read.is_cuda and torch.equal(read, made)
        monkeypatch.setattr(grouping, "GPU_GROUP_ELEMENTS", 1)
        other = made_on("cuda", recipe, device, folder=tmp_path)
        assert len(list(tmp_path.glob("*.safetensors"))) == len(other.model.info) == 4
        monkeypatch.undo()
        monkeypatch.setattr(batch_invariance, "use_onednn", lambda device: False)
        back = made_on("cuda", recipe, device, folder=tmp_path)
        assert {path.stem for path in tmp_path.glob("*.safetensors")} == back.model.info.keys()
        with pytest.raises(LoraqError, match="another recipe"):
            made_on("cuda", replace(recipe, weight=FormatConfig("int8")), device, folder=tmp_path)


def test_a_group_of_an_earlier_version_is_made_again(tmp_path):
    """Its fingerprint was of other bytes, so that it cannot be compared."""
    toy, rtn = Toy(), replace(O2, branch=BranchConfig())
    quantize_model(toy, toy_layers(), rtn, None, tmp_path, progress=None)
    path = next(tmp_path.glob("self_out*.safetensors"))
    layers, notes = load_group(path)
    save_group(path, layers, notes | {"fingerprint": "0" * 64})
    quantize_model(toy, toy_layers(), rtn, None, tmp_path, progress=None)
    assert load_group(path)[1]["fingerprint"].startswith(f"{fingerprint.LAYOUT}:")


def test_a_fingerprint_copies_bytes_of_the_models_type(monkeypatch):
    """Not the weights in float32, and not all at once."""
    monkeypatch.setattr(fingerprint, "PIECE", 1 << 10)
    units = grouping.make_units(toy_layers(), share_qkv=False)
    unit = next(unit for unit in units if unit.name == "blocks.0.up")
    group = grouping.Group("up", (unit,), grouping.UnitAllocation(RANK))

    def hashed(model: Toy) -> str:
        return fingerprint.group_fingerprint(group, model, O2, Activations())

    half = hashed(Toy().bfloat16())
    assert half != hashed(Toy()) and half == hashed(Toy().bfloat16())
    with simulated_cuda() as device:
        model = Toy().bfloat16().to("cuda")
        device.reset()
        assert hashed(model) == half
        copies = [n for (_, where), n in device.waits.items() if "fingerprint.py" in where]
        assert sum(copies) == 64 * 32 * 2 // (1 << 10) + 1, "the weight, and the bias"


@pytest.mark.parametrize("solver", ["alternation", "adam"])
def test_a_solver_that_converges_ends_with_the_cpus_losses(solver):
    """The device learns of it a round later, which must change nothing."""
    patience = PATIENCE[solver]
    branch = replace(O2.branch, solver=solver, tolerance=0.9, steps=2 * patience)
    here = made_on("cpu", replace(O2, branch=branch), Counts(), ONE)
    made = same_on_both(replace(O2, branch=branch), ONE)
    losses = [notes["losses"] for notes in made.model.info.values()]
    assert losses == [notes["losses"] for notes in here.model.info.values()]
    assert [len(rounds) for rounds in losses] == [patience + 1]
