"""A matrix of bytes that differ between neighbouring rows and columns."""

import torch
from torch import Tensor


def numbered(rows: int, columns: int) -> Tensor:
    """uint8 (rows, columns): an affine function of the position modulo 251, a prime."""
    return (torch.arange(rows * columns) * 37 % 251).view(rows, columns).to(torch.uint8)
