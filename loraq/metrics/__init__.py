"""Image metrics, one file a metric, looked up by the name of its module.

`common/` holds what metrics share, `networks/` the networks that some of them run. Imported by the
results tables and the runner; imports utils and below.
"""

from loraq.metrics.common.image_set import ImageSet
from loraq.metrics.common.result import MetricResult, Options
from loraq.metrics.registry import (
    check_metrics,
    compute,
    find_metric,
    measure,
    metric_names,
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
]
