"""The machine of a run: what a record holds of it, and how tables and pages name it."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraq.utils.gpu import describe_gpu

CPUINFO = Path("/proc/cpuinfo")


def describe_machine(device: str) -> dict[str, Any]:
    """The machine of a record: system, processor, and, on a GPU, `describe_gpu`; no host name.

    processor: its architecture; model: its name; cpus: how many this process may use.
    """
    affinity = hasattr(os, "sched_getaffinity")
    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "model": processor_model(),
        "cpus": len(os.sched_getaffinity(0)) if affinity else os.cpu_count(),
        "device": device,
        **({} if device == "cpu" else {"gpu": describe_gpu()}),
    }


def processor_model() -> str:
    """The name of the processor's model as the system tells it, "" if it does not.

    Virtual machines often hide the model's number in the name; family and model tell it.
    """
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
            return done.stdout.strip()
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            name, colon, value = line.partition(":")
            if colon:
                found.setdefault(name.strip(), value.strip())
    if "model name" in found and "cpu family" in found:
        return f"{found['model name']} (family {found['cpu family']}, model {found.get('model')})"
    if "CPU part" in found:  # Arm: numbers of the maker and of the core
        return f"Arm {found.get('CPU implementer')}/{found['CPU part']}"
    return found.get("model name") or found.get("cpu") or platform.processor()


def machine_text(machine: Mapping[str, Any]) -> str:
    """The machine of a record in words; records of earlier releases hold no model, or nothing."""
    if not machine:
        return "a machine that was not recorded"
    if gpu := machine.get("gpu"):
        libraries = [f"{name} {version}" for name, version in gpu["libraries"].items()]
        driver = [f"driver {gpu['driver']}"] if gpu["driver"] else []
        count = f"{gpu['count']} × " if gpu["count"] > 1 else ""
        memory = f"{gpu['memory'] / 1e9:.0f} GB"
        return ", ".join([f"{count}{gpu['name']} ({memory})", *driver, *libraries])
    model, cpus = machine.get("model"), f"{machine.get('cpus', '?')} cpus"
    if model:
        return f"{model}, {cpus}"
    return f"{machine.get('processor', machine.get('device', '?'))}, {cpus} (model not recorded)"
