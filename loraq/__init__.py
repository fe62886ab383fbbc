"""LoRaQ: quantised low-rank compensation for 4-bit diffusion transformers.

Start with `loraq/run.py` for the experiment, `loraq/layers/equation.py` for the layer's equation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LoraqError", "QuantizedModel", "Recipe", "quantize", "recipe", "set_compute"]

if TYPE_CHECKING:
    from loraq.api import quantize, recipe
    from loraq.config import Recipe
    from loraq.errors import LoraqError
    from loraq.layers.linear import set_compute
    from loraq.quantization.model import QuantizedModel

_HOMES = {
    "LoraqError": "loraq.errors",
    "QuantizedModel": "loraq.quantization.model",
    "Recipe": "loraq.config",
    "quantize": "loraq.api",
    "recipe": "loraq.api",
    "set_compute": "loraq.layers.linear",
}


def __getattr__(name: str) -> Any:
    """The public names, imported when first used: `import loraq` itself stays quick."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'loraq' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
