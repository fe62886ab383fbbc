"""What reads many values of the device waits for it once, not once for each."""

from __future__ import annotations

import pytest
import torch

from loraq.config import FormatConfig, Recipe
from loraq.errors import LoraqError
from loraq.models.finite import check_finite
from loraq.quantization.calibration import InputCapture
from loraq.quantization.grouping import make_units
from loraq.quantization.quantizer import quantize_model
from loraq.runner.sensitivity import measure_sensitivity
from loraq.runner.trajectories import Forward, output_errors
from tests.quantization.toy import Toy, toy_layers
from tests.simulated import simulated_cuda

RTN = Recipe(FormatConfig("int4", block=16), FormatConfig("int4", block=16))


def random_input(seed: int) -> torch.Tensor:
    return torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(seed))


def test_weights_are_checked_with_one_wait():
    with simulated_cuda() as device:
        model = Toy().to("cuda")
        device.reset()
        check_finite(model, "toy")
        assert device.waits.total() == 1, device.report()
        model.blocks[1]["up"].bias.data[3] = torch.nan
        with pytest.raises(LoraqError, match=r"'toy\.blocks\.1\.up\.bias': 1 of 64 values"):
            check_finite(model, "toy")


@torch.no_grad()
def test_captured_rows_are_copied_once_a_forward():
    def captured(model, move, after=lambda: None):
        with InputCapture(model, toy_layers(), 24, 3, 0) as rows:
            for seed in range(4):  # one more than expected
                model(move(random_input(seed)))
                after()
        return rows.inputs()

    expected = captured(Toy(), lambda x: x)
    with simulated_cuda() as device:
        model, waits = Toy().to("cuda"), []

        def count():
            waits.append(device.waits.total())
            device.reset()

        device.reset()
        found = captured(model, lambda x: x.to("cuda"), count)
        assert waits == [1] * 4 and not device.waits
    assert found.keys() == expected.keys()
    assert all(torch.equal(x, expected[name]) for name, x in found.items())


@torch.no_grad()
def test_many_rows_do_not_wait_on_the_device_for_the_end_of_the_forward(monkeypatch):
    expected = {}
    for limit in (1 << 20, 5000):
        monkeypatch.setattr("loraq.quantization.calibration.WAITING_BYTES", limit)
        with simulated_cuda() as device:
            model, x = Toy().to("cuda"), random_input(0).to("cuda")
            with InputCapture(model, toy_layers(), 64, 1, 0) as rows:
                device.reset()
                model(x)
                assert (device.waits.total() == 1) == (limit > 5000), device.report()
            expected[limit] = rows.inputs()
    assert all(torch.equal(x, expected[5000][name]) for name, x in expected[1 << 20].items())


@torch.no_grad()
def test_errors_of_steps_are_read_together():
    """The floats of the CPU, with one wait for all forwards; sensitivities with two a unit."""
    found, waits = {}, {}
    for place in ("cpu", "cuda"):
        with simulated_cuda() as device:
            model, layers = Toy().to(place), toy_layers()
            packed = quantize_model(model, layers, RTN, progress=None)
            units = make_units(layers, True)
            for count in (1, 3):
                inputs = [random_input(seed) for seed in range(count)]
                forwards = [
                    Forward(n, (x,), {}, model(x.to(place)).cpu()) for n, x in enumerate(inputs)
                ]
                with packed.applied(model):
                    output_errors(model, forwards)  # prepares the layers
                    device.reset()
                    found[place, count] = [output_errors(model, forwards)]
                    assert device.waits.total() == (place == "cuda"), device.report()
                device.reset()
                found[place, count] += [measure_sensitivity(model, units, RTN, forwards, None)]
                waits[place, count] = device.waits.total()
    assert found["cpu", 3] == found["cuda", 3] and waits["cuda", 1] == waits["cuda", 3]
