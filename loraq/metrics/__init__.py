"""Image metrics: one module per metric, found by its name (`registry.py`).

`common/` contains what several metrics use, `networks/` the networks of some metrics. Imported by
compose, results and the runner; imports config, utils and errors.
"""

from loraq.metrics.common.image_set import ImageSet
from loraq.metrics.common.result import MetricResult, Options
from loraq.metrics.registry import (
    check_metrics,
    compute,
    find_metric,
    measure,
    metric_names,
    metric_sources,
)

__all__ = [
    "ImageSet",
    "MetricResult",
    "Options",
    "check_metrics",
    "compute",
    "find_metric",
    "measure",
    "metric_names",
    "metric_sources",
]
