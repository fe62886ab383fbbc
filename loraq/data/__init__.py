"""Prompts: which sets there are, how each lies on disk, and which of them a run takes.

`sets.py` is the one table of sets; a new set is one row of it (and a reader where its file is new).
"""

from loraq.data.prompt import Prompt, seed_of_name
from loraq.data.select import calibration_prompts, data_prompts, location, random_prompts
from loraq.data.sets import set_images

__all__ = [
    "Prompt",
    "calibration_prompts",
    "data_prompts",
    "location",
    "random_prompts",
    "seed_of_name",
    "set_images",
]
