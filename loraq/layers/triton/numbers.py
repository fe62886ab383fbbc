"""The device functions of `loraq.formats.triton.numbers`, for the kernels of this package."""

from loraq.formats.triton.numbers import *  # noqa: F403
