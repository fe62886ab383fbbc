"""The fused kernel is compared with the definition at its first use on a GPU."""

from __future__ import annotations

import logging
from functools import cache

import torch

from loraq.formats.fake import by_operations
from loraq.formats.table import Format
from loraq.formats.triton.fake import launch

log = logging.getLogger(__name__)
ROWS, WIDTH = 64, 512


@cache
def agrees(fmt: Format, source: torch.dtype, result: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel gives the definition's values on this device; a warning if it does not.

    Compares random rows of magnitudes from 1e-4 to 1e3 and a row of zeros, once per process.
    """
    g = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, WIDTH, generator=g) * torch.logspace(-4, 3, ROWS)[:, None]
    x[0] = 0
    x = x.to(device, source)
    wanted = by_operations(x, fmt, result)
    try:
        found = torch.empty_like(wanted)
        launch(x, [(fmt, found)])
        if torch.equal(found, wanted):
            return True
        reason = f"{int((found != wanted).sum())} of {x.numel()} values differ"
    except Exception as error:  # whatever Triton's compiler or a driver raises on a new GPU
        reason = f"{type(error).__name__}: {error}"
    log.warning(
        "%s: the fused kernel does not give the definition's values on %s (%s). The definition is "
        "used; please report this.",
        fmt.label,
        device,
        reason,
    )
    return False
