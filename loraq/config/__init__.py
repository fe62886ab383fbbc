"""The settings of a run as frozen dataclasses, each checked on construction.

`conf/` holds the values in YAML; this package holds names, types and limits. `composition.py`
merges the files, `convert.py` makes dataclasses of the result. Errors name a setting as the command
line writes it. Imported by layers, branches, rounding and above; imports formats and below.
"""

from loraq.config.recipe import Recipe
from loraq.config.recipe_parts import (
    AllocationConfig,
    BranchConfig,
    FormatConfig,
    RoundingConfig,
    TransformConfig,
)
from loraq.config.run import (
    CalibrationConfig,
    Config,
    DataConfig,
    ExperimentRow,
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
    "ExperimentRow",
    "FormatConfig",
    "GenerateConfig",
    "MetricsConfig",
    "ModelConfig",
    "Recipe",
    "RoundingConfig",
    "TrackingConfig",
    "TransformConfig",
]
