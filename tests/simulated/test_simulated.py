"""The simulated device refuses and counts what a GPU would, with the values of a CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.simulated import MixedDevicesError, SimulatedTensor, simulated_cuda


@pytest.fixture
def device():
    with simulated_cuda() as made:
        yield made


def kinds(counter) -> dict[str, int]:
    found: dict[str, int] = {}
    for (kind, _), count in counter.items():
        found[kind] = found.get(kind, 0) + count
    return found


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_values_are_those_of_the_cpu(device, mode):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Flatten(2), nn.Linear(36, 5),
        nn.LayerNorm(5),
    )  # fmt: skip
    x = torch.randn(2, 3, 8, 8)
    with mode():
        expected = model(x)
        moved = copy.deepcopy(model).to("cuda")
        found = moved(x.cuda())
        attended = nn.functional.scaled_dot_product_attention(found, found, found)
        assert found.device == torch.device("cuda:0") and attended.is_cuda
        device.reset()
        assert torch.equal(found.cpu(), expected)
        assert kinds(device.waits) == {"copy to the host": 1}


MIXED = {
    "product": lambda x, y: x @ y,
    "sum": lambda x, y: x + y,
    "in place": lambda x, y: y.add_(x),
    "a written number": lambda x, y: y[0, 0].add_(x[0, 0]),
    "out": lambda x, y: torch.add(x, 1, out=y),
    "linear": lambda x, y: nn.functional.linear(x, y),
    "cat": lambda x, y: torch.cat([x, y]),
    "where": lambda x, y: torch.where(x > 0, x, y),
    "index": lambda x, y: y[x.argmax(0)],
    "put": lambda x, y: x.__setitem__(0, y[0]) or x.index_put_((x.argmax(0),), y[:3]),
    "attention": lambda x, y: nn.functional.scaled_dot_product_attention(x, y, x),
}


@pytest.mark.parametrize("case", MIXED)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_mixed_devices_raise(device, case, mode):
    with mode():
        x, y = torch.ones(3, 3, device="cuda"), torch.ones(3, 3)
        with pytest.raises(MixedDevicesError, match=r"cuda.*test_simulated\.py:\d+"):
            MIXED[case](x, y)


def test_single_numbers_may_mix(device):
    x = torch.ones(3, device="cuda")
    x *= torch.tensor(2.0)
    x[x > 1] = 3.0
    assert x.tolist() == [3, 3, 3] and kinds(device.waits) == {"copy to the host": 1}


WAITS = {
    "item": (lambda x: x[0].item(), "local_scalar_dense"),
    "bool": (lambda x: bool((x > 0).any()), "local_scalar_dense"),
    "float": (lambda x: float(x.sum()), "local_scalar_dense"),
    "tolist": (lambda x: x.tolist(), "copy to the host"),
    "nonzero": (lambda x: x.nonzero(), "nonzero"),
    "boolean index": (lambda x: x[x > 0], "boolean index"),
    "boolean put": (lambda x: x.__setitem__(x > 0, x[:2].clone()), "boolean index"),
    "equal": (lambda x: torch.equal(x, x + 1), "equal"),
    "unique": (lambda x: x.unique(), "unique2"),
    "copy_": (lambda x: torch.empty(3).copy_(x), "copy to the host"),
    "eigh": (lambda x: torch.linalg.eigh(torch.diag(x)), "linalg_eigh"),
    "solve": (lambda x: torch.linalg.solve(torch.diag(x + 2), x), "linalg_check_errors"),
    "synchronize": (lambda x: torch.cuda.synchronize(), "synchronize"),
}


@pytest.mark.parametrize("case", WAITS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_waits_count(device, case, mode):
    with mode():
        x = torch.tensor([-1.0, 1.0, 2.0], device="cuda")
        device.reset()
        action, kind = WAITS[case]
        action(x)
    assert kinds(device.waits) == {kind: 1}
    assert "tests/simulated/test_simulated.py" in next(iter(device.waits))[1]


def test_what_does_not_wait(device):
    x = torch.randn(4, 4, device="cuda")
    y = x[torch.arange(2, device="cuda")] @ x
    y[:, 0].fill_(2.0)
    torch.where(y > 0, y, 0.0).to(torch.float16).to("cpu", non_blocking=True)
    torch.linalg.solve_ex(x, y.mT)
    torch.linalg.cholesky_ex(x)
    assert not device.waits and not device.copies and not device.float64


def test_copies_and_float64_count(device):
    x = torch.eye(2).cuda()
    torch.tensor([1.0], device="cuda")
    x[torch.tensor([0])]
    assert kinds(device.copies) == {"copy to the device": 2, "index from the host": 1}
    torch.linalg.qr(x.double() @ x.double())
    assert kinds(device.float64) == {"mm": 1, "linalg_qr": 1}
    assert "float64: 2" in device.report() and not device.waits


def test_writes_and_views_keep_their_tensors(device):
    x, out = torch.zeros(4, device="cuda"), torch.empty(4, device="cuda")
    view = x[:2]
    assert x.add_(1) is x and torch.mul(x, 2, out=out) is out
    view += 5
    assert x.tolist() == [6, 6, 1, 1] and out.tolist() == [2, 2, 2, 2]
    values, indices = torch.empty(2, device="cuda"), torch.empty(2, device="cuda").long()
    found = torch.topk(x, 2, out=(values, indices))
    assert found[0] is values and values.tolist() == [6, 6]
    version = x._version
    view.mul_(2)
    assert x._version > version
    with pytest.raises(NotImplementedError, match="shape"):
        x.unsqueeze_(0)


def test_inference_tensors(device):
    x = torch.ones(2, 3, device="cuda")
    with torch.inference_mode():
        assert not x[None].is_inference() and (x + x[0]).is_inference()
        assert (x + x)[None].add_(1).is_inference()


def test_gradients_are_those_of_the_cpu(device):
    def gradient(x):
        x = x.detach().requires_grad_()
        y, z = torch.stack([x * x, x.sin() @ x.mT]).unbind(0)
        (y / (1 + z.exp()) + x[:, 1:2] * y).square().mean().backward()
        return x.grad

    torch.manual_seed(1)
    x = torch.randn(5, 5)
    found = gradient(x.cuda())
    assert found.is_cuda and torch.equal(found.cpu(), gradient(x))


def test_generators_belong_to_a_device(device):
    cpu, cuda = torch.Generator(), torch.Generator("cuda")
    assert isinstance(cpu, torch.Generator) and isinstance(cuda, torch.Generator)
    assert cuda.device.type == "cuda" and torch.randn(2, device="cuda", generator=cuda).is_cuda
    same = torch.Generator().manual_seed(3), torch.Generator("cuda").manual_seed(3)
    drawn = torch.randn(2, generator=same[0]), torch.randn(2, device="cuda", generator=same[1])
    assert torch.equal(drawn[0], drawn[1].cpu())
    with pytest.raises(MixedDevicesError, match="generator on cpu draws for cuda"):
        torch.randn(2, device="cuda", generator=cpu)
    with pytest.raises(MixedDevicesError, match="generator on cuda draws for cpu"):
        torch.randn(2, generator=cuda)


def test_files_load_onto_the_device_and_are_saved_from_it(device, tmp_path):
    x = torch.arange(6.0).view(2, 3)
    save_file({"x": x.cuda()}, tmp_path / "x.safetensors")
    torch.save({"x": x.cuda()}, tmp_path / "x.pt")
    assert kinds(device.waits) == {"copy to the host": 2}
    for found in (
        load_file(tmp_path / "x.safetensors", device="cuda"),
        torch.load(tmp_path / "x.pt", map_location="cuda", weights_only=True),
    ):
        assert found["x"].is_cuda and torch.equal(found["x"].cpu(), x)
    assert not load_file(tmp_path / "x.safetensors")["x"].is_cuda
    y = x.cuda()
    with pytest.raises(RuntimeError, match="share memory"):
        save_file({"a": y, "b": y.view(6)}, tmp_path / "shared.safetensors")


def test_the_description_can_be_chosen():
    there = torch.cuda.is_available()
    with simulated_cuda(name="AMD Instinct MI300X", capability=(9, 4), count=8, free=5) as device:
        assert torch.cuda.get_device_name(0) == "AMD Instinct MI300X" and device.count == 8
        assert torch.cuda.device_count() == 8 and torch.cuda.mem_get_info()[0] == 5
        assert torch.cuda.get_device_properties(0).major == 9
        x = torch.ones(2, device="cuda")
    assert isinstance(x, SimulatedTensor) and x.cpu().tolist() == [1, 1]
    assert torch.cuda.is_available() == there
