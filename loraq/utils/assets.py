"""Files that come with the package (`asset:NAME`), and whether the network may be used."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
"""The package's own folder: `loraq/`."""
ASSETS = PACKAGE / "assets"
CONF = PACKAGE / "conf"
"""The Hydra configuration. In a checkout this is a link to `conf/` beside the package."""
CHECKOUT = PACKAGE.parent
"""The checkout that the package is in; it holds `results/` and the documentation."""


def resolve_asset(path: str) -> Path:
    """`asset:NAME` as a path inside the package; any other path unchanged, with `~` expanded."""
    if path.startswith("asset:"):
        return ASSETS / path.removeprefix("asset:")
    return Path(path).expanduser()


def offline() -> bool:
    """Whether environment variables forbid the hub libraries to use the network."""
    truth = ("1", "true", "yes", "on")
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "DIFFUSERS_OFFLINE")
    return any(os.environ.get(name, "").lower() in truth for name in names)
