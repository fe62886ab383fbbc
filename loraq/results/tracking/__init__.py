"""Weights & Biases runs of a finished experiment: one per row, and an overview of all rows.

Offline by default. Records stay the only source of the tables; any failure here is a warning,
because the records are already on disk. Imported by the runner; imports records.
"""

from loraq.results.tracking.contents import IMAGES, TrackedImage
from loraq.results.tracking.tracker import MODES, Mode, Tracker

__all__ = ["IMAGES", "MODES", "Mode", "TrackedImage", "Tracker"]
