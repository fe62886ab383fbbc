"""A finished experiment → Weights & Biases runs, one a row and an overview of all rows.

Offline unless the config says otherwise. W&B shows, it does not keep: tables never read it, and
whatever goes wrong here is a warning, because the records are already on disk.
"""

from loraq.results.tracking.contents import IMAGES, TrackedImage
from loraq.results.tracking.tracker import MODES, Tracker

__all__ = ["IMAGES", "MODES", "TrackedImage", "Tracker"]
