"""Pipelines and their layers: load, list, hash. One short file a family beside this one."""

from loraq.models.families import Layer, family_names, list_layers
from loraq.models.loading import load_pipeline, resolve_folder, weights_hash

__all__ = [
    "Layer",
    "family_names",
    "list_layers",
    "load_pipeline",
    "resolve_folder",
    "weights_hash",
]
