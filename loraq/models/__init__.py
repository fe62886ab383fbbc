"""Diffusion pipelines: model files, loading, and the layers to quantise.

`families/` has one module per model family, with the roles of its layers. Imported by data,
metrics, quantization and above; imports config and below.
"""

from loraq.models.family import family_names
from loraq.models.layers import Layer, list_layers
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
