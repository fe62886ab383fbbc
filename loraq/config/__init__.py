"""The schema: frozen dataclasses, each checked as it is made.

YAML (`conf/`) holds values, these files hold names, types and limits; `door.py` converts one into
the other. Every error names the key as it is written on the command line.
"""

from loraq.config.recipe import (
    AllocationConfig,
    BranchConfig,
    FormatConfig,
    Recipe,
    RoundingConfig,
    TransformConfig,
)
from loraq.config.run import (
    CalibrationConfig,
    Config,
    DataConfig,
    GenerateConfig,
    MetricsConfig,
    ModelConfig,
    TrackingConfig,
)

__all__ = [
    "AllocationConfig",
    "BranchConfig",
    "CalibrationConfig",
    "Config",
    "DataConfig",
    "FormatConfig",
    "GenerateConfig",
    "MetricsConfig",
    "ModelConfig",
    "Recipe",
    "RoundingConfig",
    "TrackingConfig",
    "TransformConfig",
]
