"""Records name the processor or the GPU; those of earlier releases say that they do not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from loraq.utils import gpu, machine
from loraq.utils.machine import describe_machine, machine_text

INTEL = """\
processor\t: 0
cpu family\t: 6
model\t\t: 143
model name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz

processor\t: 1
model name\t: another
"""
ARM = "processor\t: 0\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU part\t: 0xd4f\n"
POWER = "processor\t: 0\ncpu\t\t: POWER9, altivec supported\n"


@pytest.mark.parametrize(
    ("text", "model"),
    [
        (INTEL, "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz (family 6, model 143)"),
        (ARM, "Arm 0x41/0xd4f"),
        (POWER, "POWER9, altivec supported"),
    ],
)
def test_the_processor_is_named_by_its_model(tmp_path, monkeypatch, text, model):
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr("platform.system", lambda: "Linux")
    found = describe_machine("cpu")
    assert found["model"] == model and "gpu" not in found
    assert machine_text(found) == f"{model}, {found['cpus']} cpus"


def test_a_gpu_is_named_with_memory_driver_and_libraries(tmp_path, monkeypatch):
    properties = SimpleNamespace(
        **{"name": "NVIDIA H100 80GB HBM3", "major": 9, "minor": 0},
        **{"multi_processor_count": 132, "total_memory": 85 * 10**9},
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: properties)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(gpu, "DRIVERS", (tmp_path / "version",))
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64  580.65.06  Sat\n")
    found = describe_machine("cuda")
    assert found["gpu"]["settings"]["cudnn.allow_tf32"] is False
    text = machine_text(found)
    assert text.startswith("8 × NVIDIA H100 80GB HBM3 (85 GB), driver 580.65.06, CUDA 13.2, cuDNN")


def test_what_earlier_releases_did_not_record_is_said():
    old = {"system": "Linux", "processor": "x86_64", "cpus": 2, "device": "cpu"}
    assert machine_text(old) == "x86_64, 2 cpus (model not recorded)"
    assert machine_text({}) == "a machine that was not recorded"
