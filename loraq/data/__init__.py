"""Prompt sets: their files, their download, and the prompts that a run uses.

`sets.py` is the table of sets; a new set is one row (and a reader in `readers.py` for a new file
format). Imported by the runner, results and the command line; imports models, config and below.
"""

from loraq.data.prompt import Prompt, seed_of_name
from loraq.data.select import calibration_prompts, data_prompts, prompts_path, random_prompts
from loraq.data.sets import real_image_paths

__all__ = [
    "Prompt",
    "calibration_prompts",
    "data_prompts",
    "prompts_path",
    "random_prompts",
    "real_image_paths",
    "seed_of_name",
]
