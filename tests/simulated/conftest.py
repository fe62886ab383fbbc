"""What the tests on the simulated device have in common."""

import pytest

from loraq.utils import batch_invariance


@pytest.fixture(autouse=True)
def one_matrix_library(monkeypatch):
    """The CPU's products with the library that the device uses here; others differ in last bits."""
    monkeypatch.setattr(batch_invariance, "use_onednn", lambda device: False)
