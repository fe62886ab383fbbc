"""LoRaQ: quantised low-rank compensation for 4-bit diffusion transformers."""

from __future__ import annotations

__version__ = "0.1.0"
