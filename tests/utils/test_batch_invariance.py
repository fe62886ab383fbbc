"""Products on processors whose library does not listen: the same values, the same rows."""

from __future__ import annotations

import pytest
import torch

from loraq.layers.equation import matmul
from loraq.utils import batch_invariance


@pytest.mark.parametrize("shape", [(5, 7, 3), (128, 384, 1536), (2, 64, 48, 384)])
def test_onednn_multiplies_as_matmul_does(shape):
    *leading, width, out = shape
    x, w_OI = torch.randn(*leading, width), torch.randn(out, width)
    wanted = matmul(x.double(), w_OI.double())
    assert (
        batch_invariance.onednn_product(x, w_OI) - wanted
    ).abs().max() < 1e-5 * wanted.abs().max()
    assert batch_invariance.onednn_product(x[:0], w_OI).shape == (0, *leading[1:], out)


def test_a_batch_is_cut_only_where_products_depend_on_it(monkeypatch):
    for invariant, device, images in ((True, "cpu", 8), (False, "cpu", 1), (False, "cuda", 8)):
        monkeypatch.setattr(batch_invariance, "row_invariant", lambda held=invariant: held)
        assert batch_invariance.batch_limit(8, device) == images
        assert batch_invariance.use_onednn(device) == (images == 1)
