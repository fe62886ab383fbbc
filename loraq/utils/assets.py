"""Paths of files in this package (`asset:NAME`), in others and in the cache; the network."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from loraq.errors import LoraqError

PACKAGE = Path(__file__).resolve().parents[1]
"""The folder of the package, `loraq/`."""
ASSETS = PACKAGE / "assets"
CONF = PACKAGE / "conf"
"""The Hydra configuration. In a checkout it is a link to `conf/` next to the package."""
CHECKOUT = PACKAGE.parent
"""The checkout that contains the package, `results/` and the documentation."""


def resolve_asset(path: str) -> Path:
    """`asset:NAME` → a path in the package; other paths unchanged, with `~` expanded."""
    if path.startswith("asset:"):
        return ASSETS / path.removeprefix("asset:")
    return Path(path).expanduser()


def cache_folder() -> Path:
    """`loraq` in the folder of the hub's cache: $HF_HOME, else ~/.cache/huggingface."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")
    return Path(os.path.expandvars(home)).expanduser() / "loraq"


def package_folder(module: str, requirement: str) -> Path:
    """The folder of an installed package, which is not imported; LoraqError without it.

    requirement: what pip installs, for the error.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise LoraqError(f"The package {module} is not installed: pip install {requirement}")
    return Path(spec.origin).parent


def offline() -> bool:
    """Whether environment variables (HF_HUB_OFFLINE, …) disable network access."""
    truth = ("1", "true", "yes", "on")
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "DIFFUSERS_OFFLINE")
    return any(os.environ.get(name, "").lower() in truth for name in names)
