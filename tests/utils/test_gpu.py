"""A GPU's arithmetic is the same in every run, whatever was set before, and is then as before."""

from __future__ import annotations

import pytest
import torch

from loraq.utils import gpu
from loraq.utils.gpu import SETTINGS, driver_version, fixed_arithmetic


def settings() -> dict[str, object]:
    owners = {"matmul": torch.backends.cuda.matmul, "cudnn": torch.backends.cudnn}
    pairs = (name.split(".") for name in SETTINGS)
    return {f"{owner}.{name}": getattr(owners[owner], name) for owner, name in pairs}


def test_a_run_computes_with_the_stated_settings_and_restores_those_before():
    before = settings()
    assert before != SETTINGS
    with pytest.raises(ZeroDivisionError), fixed_arithmetic():
        assert settings() == SETTINGS
        1 / 0  # noqa: B018
    assert settings() == before


def test_both_interfaces_to_tf32_are_set_and_restored():
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.fp32_precision, cudnn.conv.fp32_precision
    matmul.fp32_precision = cudnn.conv.fp32_precision = "tf32"
    try:
        with fixed_arithmetic():
            assert matmul.fp32_precision == cudnn.conv.fp32_precision == "ieee"
            assert settings() == SETTINGS
        assert matmul.fp32_precision == cudnn.conv.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision, cudnn.conv.fp32_precision = before


def test_the_driver_is_read_from_the_system(tmp_path, monkeypatch):
    path = tmp_path / "version"
    monkeypatch.setattr(gpu, "DRIVERS", (tmp_path / "none", path))
    assert driver_version() == ""
    path.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n"
        "GCC version:  gcc version 13.3.0\n"
    )
    assert driver_version() == "580.65.06"
