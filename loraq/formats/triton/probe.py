"""The fused kernel is compared with the definition at its first use on a GPU."""

from __future__ import annotations

from functools import cache

import torch

from loraq.errors import LoraqError
from loraq.formats.fake import by_operations
from loraq.formats.table import Format
from loraq.formats.triton.fake import launch

ROWS, WIDTH = 64, 512


@cache
def check_agreement(
    fmt: Format, source: torch.dtype, result: torch.dtype, device: torch.device
) -> None:
    """LoraqError if the kernel does not give the definition's values on this device.

    Compares random rows of magnitudes from 1e-4 to 1e3 and a row of zeros, once per process. It
    does not fall back in silence: a fused rotation sums in another order, which keys must hold.
    """
    g = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, WIDTH, generator=g) * torch.logspace(-4, 3, ROWS)[:, None]
    x[0] = 0
    x = x.to(device, source)
    wanted = by_operations(x, fmt, result)
    found = torch.empty_like(wanted)
    launch(x, [(fmt, found)])
    if not torch.equal(found, wanted):
        raise LoraqError(
            f"{fmt.label}: the fused kernel gives {int((found != wanted).sum())} of {x.numel()} "
            f"values that are not those of the definition on {device}. Set LORAQ_FUSED=0 in the "
            "environment, which takes the definition, and please report this."
        )
