"""A packed pipeline that every test of a layout may export; none may change it."""

from __future__ import annotations

import pytest
from diffusers import PixArtSigmaPipeline

import loraq

RECIPE = ("lqer", "quant.branch.rank=4", "quant.transform.shift=true")


@pytest.fixture(scope="session")
def packed(tiny_folder):
    """The pipeline of `tiny_folder` in INT4 with a shift, and a branch of rank 4 in INT8."""
    pipe = PixArtSigmaPipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)
    loraq.quantize(pipe, loraq.recipe(*RECIPE), progress=False)
    return pipe
