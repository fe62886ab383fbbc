"""LoRaQ: quantised low-rank compensation for 4-bit diffusion transformers.

`quantize`, `recipe` and `export` are the Python API, `loraq/run.py` runs an experiment, and
`loraq/layers/equation.py` defines the quantised layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "LoraqError",
    "QuantizedModel",
    "Recipe",
    "__version__",
    "export",
    "quantize",
    "recipe",
    "score",
    "set_compute",
]

if TYPE_CHECKING:
    from loraq.api import quantize, recipe
    from loraq.config import Recipe
    from loraq.errors import LoraqError
    from loraq.layers.linear import set_compute
    from loraq.layouts.export import export
    from loraq.quantization.model import QuantizedModel
    from loraq.runner.score import score

_MODULES = {
    "LoraqError": "loraq.errors",
    "QuantizedModel": "loraq.quantization.model",
    "Recipe": "loraq.config",
    "export": "loraq.layouts.export",
    "quantize": "loraq.api",
    "recipe": "loraq.api",
    "score": "loraq.runner.score",
    "set_compute": "loraq.layers.linear",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import loraq` does not import torch."""
    import importlib

    if name not in _MODULES:
        raise AttributeError(f"module 'loraq' has no attribute '{name}'")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    """The public names, for tab completion."""
    return __all__
