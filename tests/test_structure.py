"""The layout of the package: public import paths, few names at the top, imports where they belong.

That imports go one way and in no circle is checked by `lint-imports` (`make check`).
"""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import loraq
from loraq.utils.assets import PACKAGE

MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "assets" not in path.parts)
NAMES_AT_THE_TOP = 21

PUBLIC = {
    "loraq": loraq.__all__,
    "loraq.api": ["quantize", "recipe"],
    "loraq.branches": ["Problem", "Solution", "find"],
    "loraq.branches.alternating": ["Best", "find"],
    "loraq.branches.linear_algebra": ["truncated_svd", "tracked_svd", "first_image", "balance"],
    "loraq.branches.loraq": ["find"],
    "loraq.branches.svd": ["find", "start_factors"],
    "loraq.compose": ["load_rows"],
    "loraq.config": ["BranchConfig", "Config", "FormatConfig", "Recipe", "TransformConfig"],
    "loraq.diffusers_quantizer": ["LoRaQConfig", "LoRaQQuantizer", "packed_layers"],
    "loraq.errors": ["LoraqError"],
    "loraq.formats": ["Format", "get_format", "quantize", "dequantize", "fake_quantize"],
    "loraq.layouts.targets": ["Source", "Target", "find_target", "targets"],
    "loraq.models": ["list_layers", "load_pipeline"],
    "loraq.run": ["run"],
}
"""Import paths that users' own files and notebooks rely on."""

ENTRY_POINTS = ("loraq", "loraq.cli", "loraq.run", "loraq.results", "loraq.readme")

HEAVY = {
    "loraq/__init__.py",  # public names are imported when they are first used
    "loraq/api.py",  # diffusers
    "loraq/cli.py",  # `--help` and `--version` are quick
    "loraq/run.py",  # the CPU's arithmetic is configured before torch is imported
    "loraq/formats/operator.py",  # Triton is optional
    "loraq/layers/backends.py",
    "loraq/models/layers.py",
    "loraq/models/loading.py",
    "loraq/models/families/pixart_sigma.py",  # configurations compose without torch
    "loraq/models/families/sana.py",
    "loraq/metrics/alignment.py",  # metrics are looked up without importing torch
    "loraq/metrics/common/features.py",
    "loraq/metrics/image_reward.py",
    "loraq/quantization/adapters.py",  # peft is optional
    "loraq/quantization/facilities.py",
    "loraq/quantization/model.py",  # diffusers
    "loraq/runner/overflow.py",
    "loraq/runner/score.py",
    "loraq/runner/session.py",
}
"""Files that import modules of ours inside functions, because those import heavy packages."""


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_where_users_import_them_from(module):
    found = importlib.import_module(module)
    assert [name for name in PUBLIC[module] if not hasattr(found, name)] == []


@pytest.mark.parametrize("module", ENTRY_POINTS)
def test_entry_points_run_as_modules(module):
    command = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower() or "powered by hydra" in done.stdout.lower()


def test_the_top_of_the_package_holds_few_names():
    entries = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py"}
    entries |= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    names = sorted(name for name in entries if not name.startswith("__"))
    assert len(names) <= NAMES_AT_THE_TOP, names


def test_a_package_says_what_is_in_it():
    for path in PACKAGE.rglob("__init__.py"):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        assert len(text) > 40, f"{path} does not say what the package holds"


def test_imports_inside_functions_only_keep_heavy_packages_away():
    found = {
        str(path.relative_to(PACKAGE.parent))
        for path in MODULES
        for node in _own_imports(path)
        if node.col_offset and not _for_types(path, node)
    }
    assert found <= HEAVY, found - HEAVY


def test_no_module_imports_private_names_of_another():
    taken = [
        f"{path.relative_to(PACKAGE)}: {node.module}.{alias.name}"
        for path in MODULES
        for node in _own_imports(path)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    ]
    assert taken == []


def test_both_forms_of_imports_are_seen(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("def f():\n    import loraq.x\n    from loraq import y\n    import loraqs\n")
    assert [node.lineno for node in _own_imports(path)] == [2, 3]


def _own_imports(path: Path) -> list[ast.Import | ast.ImportFrom]:
    def ours(node: ast.AST) -> bool:
        if isinstance(node, ast.Import):
            return any(alias.name.split(".")[0] == "loraq" for alias in node.names)
        return isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "loraq"

    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if ours(node)]


def _for_types(path: Path, wanted: ast.Import | ast.ImportFrom) -> bool:
    """Whether the import stands under `if TYPE_CHECKING:`."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if typing and any(wanted.lineno == inner.lineno for inner in node.body):
            return True
    return False
