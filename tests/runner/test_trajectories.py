"""Teacher-forced errors: exact 16-bit recording, errors by role, predictions of sensitivity."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from loraq.config import BranchConfig, FormatConfig, ModelConfig, Recipe
from loraq.data import Prompt
from loraq.errors import LoraqError
from loraq.models import list_layers, load_pipeline
from loraq.quantization.grouping import make_units
from loraq.quantization.quantizer import quantize_model
from loraq.runner import trajectories
from loraq.runner.generate import image_batch
from loraq.runner.sensitivity import measure_sensitivity
from loraq.runner.trajectories import Forward, errors_by_role, output_errors
from tests.little import little_config

PROMPTS = [Prompt(f"p{i}", f"a {colour} cat") for i, colour in enumerate(["red", "green", "blue"])]
STEPS = 5


def rtn(weight: str, activation: str | None = None) -> Recipe:
    formats = FormatConfig(weight), FormatConfig(activation or weight)
    return Recipe(weight=formats[0], activation=formats[1], branch=BranchConfig(kind="none"))


class Exact(torch.nn.Module):
    """A quantised layer computed by `LayerTensors.forward`, without `QuantizedLinear`."""

    def __init__(self, tensors) -> None:
        super().__init__()
        self.tensors = tensors

    def forward(self, x):
        return self.tensors.forward(x)


@pytest.fixture(scope="module")
def model(tiny_folder) -> ModelConfig:
    return little_config(path=str(tiny_folder), steps=STEPS)


@pytest.fixture(scope="module")
def pipe(model):
    return load_pipeline(model)


@pytest.fixture(scope="module")
def forwards(pipe, model) -> list[Forward]:
    return trajectories.record_forwards(pipe, model, PROMPTS, seed=3, batch_size=2)


@pytest.fixture(scope="module")
def layers(pipe):
    return list_layers(pipe.transformer, "pixart_sigma")


@pytest.fixture(scope="module")
def quantized(pipe, layers):
    return quantize_model(pipe.transformer, layers, rtn("int4"), progress=None)


@pytest.fixture
def untouched(pipe):
    """Fails unless modules, hooks and weights are the same after the test."""

    def state():
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules()]
        return [id(m) for m in modules()], hooks, [p.sum().item() for p in parameters()]

    def modules():
        return list(pipe.transformer.modules())

    def parameters():
        return list(pipe.transformer.parameters())

    before = state()
    yield
    assert state() == before


def test_the_16_bit_model_has_no_error_at_any_step(pipe, forwards, untouched):
    assert [f.step for f in forwards] == [*range(STEPS), *range(STEPS)]
    assert output_errors(pipe.transformer, forwards) == [0.0] * STEPS


def test_recorded_forwards_are_those_of_generation(pipe, model, forwards):
    """The scheduler's timesteps; guidance doubles the batch; variance channels are dropped."""
    again = trajectories.record_forwards(pipe, model, PROMPTS, seed=3, batch_size=2)
    assert all(torch.equal(a.output, b.output) for a, b in zip(forwards, again, strict=True))
    pipe.scheduler.set_timesteps(STEPS)
    times = [int(f.kwargs["timestep"][0]) for f in forwards]
    assert times == [int(t) for t in pipe.scheduler.timesteps] * 2
    assert [f.output.shape for f in forwards] == [(4, 4, 8, 8)] * STEPS + [(2, 4, 8, 8)] * STEPS
    seeds = trajectories.record_forwards(pipe, model, PROMPTS[:1], seed=4, batch_size=2)
    assert not torch.equal(seeds[0].output, forwards[0].output[:1])
    own = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda _module, args, kwargs: own.append((*args, *kwargs.values())[0]), with_kwargs=True
    )
    image_batch(pipe, model, PROMPTS[:2], 3, output_type="latent")
    handle.remove()
    recorded = [(*f.args, *f.kwargs.values())[0] for f in forwards[:STEPS]]
    assert all(torch.equal(a, b) for a, b in zip(own, recorded, strict=True))


def test_every_keeps_every_second_step_and_unchanging_inputs_once(pipe, model, forwards, untouched):
    some = trajectories.record_forwards(pipe, model, PROMPTS, seed=3, batch_size=2, every=2)
    assert [f.step for f in some] == [0, 2, 4, 0, 2, 4]
    assert torch.equal(some[1].output, forwards[2].output)
    assert output_errors(pipe.transformer, some) == [0.0] * 3
    text = [f.kwargs["encoder_hidden_states"] for f in some]
    assert text[0] is text[1] is text[2] is not text[3]
    assert some[0].kwargs["timestep"] is not some[1].kwargs["timestep"]


def test_hook_is_removed_when_the_pipeline_fails(pipe, model, untouched):
    with pytest.raises(Exception, match="height"):
        broken = ModelConfig(**{**vars(model), "height": 60})
        trajectories.record_forwards(pipe, broken, PROMPTS, 0, 2)


def test_applied_restores_the_same_modules_also_after_an_exception(
    pipe, quantized, layers, untouched
):
    name = layers[0].name
    linear = pipe.transformer.get_submodule(name)
    with quantized.subset([]).applied(pipe.transformer):
        assert pipe.transformer.get_submodule(name) is linear
    with pytest.raises(ZeroDivisionError), quantized.subset([name]).applied(pipe.transformer):
        assert pipe.transformer.get_submodule(name) is not linear
        assert isinstance(pipe.transformer.get_submodule(layers[1].name), torch.nn.Linear)
        1 / 0  # noqa: B018
    with (
        quantized.subset([name]).applied(pipe.transformer),
        pytest.raises(LoraqError, match="quantised already"),
        quantized.subset(quantized.layers).applied(pipe.transformer),
    ):
        pass


def test_errors_by_role_are_those_of_applying_the_role_by_hand(
    pipe, quantized, layers, forwards, untouched
):
    transformer = pipe.transformer
    errors = errors_by_role(transformer, quantized, layers, forwards)
    assert list(errors) == ["all", *dict.fromkeys(layer.role for layer in layers)]
    assert all(len(e) == STEPS and min(e) > 0 for e in errors.values())

    linears = {l.name: transformer.get_submodule(l.name) for l in layers if l.role == "ff_down"}
    squares = torch.zeros(2, STEPS, dtype=torch.float64)
    with torch.inference_mode():
        for name in linears:
            tensors = quantized.layers[name]
            transformer.set_submodule(name, Exact(tensors))
        for f in forwards:
            output = transformer(*f.args, **f.kwargs)[0][:, :4].double()
            squares[0, f.step] += (output - f.output).square().sum()
            squares[1, f.step] += f.output.double().square().sum()
    for name, linear in linears.items():
        transformer.set_submodule(name, linear)
    by_hand = (squares[0] / squares[1]).sqrt().tolist()
    assert errors["ff_down"] == pytest.approx(by_hand, rel=1e-3)

    one = [layer for layer in layers if layer.role == "ff_down"]
    part = quantize_model(transformer, one, rtn("int4"), progress=None)
    assert errors_by_role(transformer, part, layers, forwards) == {
        "all": errors["ff_down"],
        "ff_down": errors["ff_down"],
    }
    with pytest.raises(LoraqError, match="have no role"):
        errors_by_role(transformer, quantized, one, forwards)


def test_sensitivity_at_4_bits_predicts_the_effects_of_8_bits(pipe, layers, forwards, untouched):
    """s·e² predicts, to first order, the effect of any error e.

    Squared 8-bit errors are about 300 times smaller; s at 4 bits predicts their effect within a
    factor of 2 per unit, and of 1.5 for all units together.
    """
    transformer, first = pipe.transformer, [f for f in forwards if f.step == 0]
    units = make_units(layers, share_qkv=True)
    at_4 = measure_sensitivity(transformer, units, rtn("int4"), first, progress=None)
    at_8 = measure_sensitivity(transformer, units, rtn("int8"), first, progress=None)
    packed = quantize_model(transformer, layers, rtn("int8"), progress=None)
    predicted = 0.0
    for unit in units:
        with packed.subset([layer.name for layer in unit.layers]).applied(transformer):
            effect = output_errors(transformer, first)[0] ** 2
        layer_error = effect / at_8[unit.name]  # what at_8 was divided by: the unit's own e²
        assert 1e-6 < layer_error < 1e-3
        assert 0.5 < at_4[unit.name] * layer_error / effect < 2, unit.name
        predicted += at_4[unit.name] * layer_error
    with packed.subset(packed.layers).applied(transformer):
        together = output_errors(transformer, first)[0] ** 2
    assert 1 / 1.5 < predicted / together < 1.5
    assert max(at_4.values()) > 3 * min(at_4.values()), "units that matter differently"


@pytest.mark.parametrize("settings", [{"batch_size": 0}, {"every": 0}, {"prompts": []}])
def test_invalid_settings_and_missing_forwards_are_errors(pipe, model, settings):
    with pytest.raises(LoraqError, match="limit"):
        trajectories.record_forwards(
            pipe, model, **{"prompts": PROMPTS, "seed": 0, "batch_size": 2} | settings
        )
    with pytest.raises(LoraqError, match="No forwards"):
        output_errors(pipe.transformer, [])
    with pytest.raises(LoraqError, match="No forwards"):
        measure_sensitivity(pipe.transformer, [], rtn("int4"), [], progress=None)


def test_all_common_forms_of_inputs_and_outputs_are_supported():
    """Tuples, objects with `.sample`; None, flags, tensors in dicts and lists."""

    class Named:
        sample = torch.ones(1, 2)

    assert trajectories._sample((Named.sample,)) is trajectories._sample(Named()) is Named.sample
    assert torch.equal(trajectories._sample(([Named.sample, Named.sample],)), torch.ones(2, 1, 2))
    value = {"a": None, "b": [True, Named.sample], "c": {"d": (2, Named.sample)}}
    doubled = trajectories._mapped(value, lambda tensor: tensor * 2)
    assert doubled["a"] is None and doubled["b"][0] is True and doubled["c"]["d"][0] == 2
    assert doubled["b"][1].sum() == doubled["c"]["d"][1].sum() == 4 and Named.sample.sum() == 2


def test_an_output_that_is_not_finite_has_no_error(pipe, forwards):
    class Overflows(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, hidden_states, **_more):
            return (torch.full_like(hidden_states, torch.inf) * self.weight,)

    with pytest.raises(LoraqError, match=r"at step 0 has the error (inf|nan)"):
        output_errors(Overflows(), forwards)
    nothing = [Forward(2, f.args, f.kwargs, torch.zeros_like(f.output)) for f in forwards[:1]]
    with pytest.raises(LoraqError, match=r"at step 2 (.|\n)*the norm 0"):
        output_errors(pipe.transformer, nothing)


def test_only_channels_that_the_sampler_does_not_read_are_dropped():
    """Packed tokens (B, N, C) may be twice as many as there are channels: all of them count."""

    class Network(torch.nn.Module):
        config = SimpleNamespace(in_channels=4)

        def forward(self, x):
            return (x,)

    kept: list[Forward] = []
    network = Network()
    hook = trajectories._Recorder(kept, 1, SimpleNamespace()).of("")
    network.register_forward_hook(hook, with_kwargs=True)
    for shape in ((1, 8, 3, 3), (1, 8, 4)):
        network(torch.ones(shape))
    assert [forward.output.shape[1] for forward in kept] == [4, 8]
