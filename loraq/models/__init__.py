"""Diffusion pipelines and their layers: find the files, load, list the layers to quantise.

Imported by data, metrics, quantization and above; imports config and below.
"""

from loraq.models.layers import Layer, family_names, list_layers
from loraq.models.loading import load_pipeline
from loraq.models.source import resolve_folder, weights_hash

__all__ = [
    "Layer",
    "family_names",
    "list_layers",
    "load_pipeline",
    "resolve_folder",
    "weights_hash",
]
