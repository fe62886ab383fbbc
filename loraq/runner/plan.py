"""Which products are there, which are to be made, and early checks.

Everything here works from configs, files and manifests; no model is loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from loraq import metrics
from loraq.config import Config
from loraq.errors import LoraqError
from loraq.layers.backends import check_compute
from loraq.models.layers import list_layers
from loraq.models.loading import meta_transformer
from loraq.quantization.budget import planned_branch_bits
from loraq.runner.product_keys import ACTIVATIONS, Row, keyed
from loraq.runner.real_images import real_images
from loraq.runner.store import Store
from loraq.utils import batch_invariance


def make_plan(configs: Sequence[Config], store: Store, last: str = "record") -> list[Row]:
    """The rows with their keys, and for each what is still to be made, up to the stage `last`.

    Every product that is there is read and compared with its checksums; a damaged one is reported
    and set aside by the store, and planned anew.
    """
    batch_invariance.configure_cpu_math()
    rows = [keyed(config) for config in configs]
    state: dict[tuple[str, str], bool] = {}

    def finished(stage: str, row: Row) -> bool:
        product = (stage.split(":")[0], row.keys[stage])
        if product not in state:
            state[product] = store.finished(*product)
        return state[product]

    planned = []
    for row in rows:
        there = {stage: finished(stage, row) for stage in row.keys if stage != "reference"}
        damaged = {s for s in there if (s.split(":")[0], row.keys[s]) in store.corrupted}
        ends = {"record": ("images", "record"), "images": ("images",)}.get(last, ())
        todo = {stage for stage in ends if not there[stage]} | damaged
        if "images" in todo and not there["embeddings"]:
            todo.add("embeddings")
        if "record" in todo and not there["measured"]:
            todo.add("measured")
        if row.recipe is not None:
            if not there["quantised"] and (todo & {"images", "measured"} or last == "quantised"):
                todo.add("quantised")
            if not there["inputs:measure"] and "measured" in todo:
                todo.add("inputs:measure")
            if "quantised" in todo:
                read = (stage for stage in ACTIVATIONS[:-1] if stage in row.keys)
                todo |= {stage for stage in read if not there[stage]}
        planned.append(dataclasses.replace(row, todo=frozenset(todo)))
    return planned


def check(rows: Sequence[Row]) -> None:
    """Everything that would fail later and can be known now: metrics, real images, layers, rank."""
    for row in rows:
        if row.config.compute == "triton" and row.device == "cpu":
            raise LoraqError(
                "compute=triton runs on a GPU, and this run is on the CPU. Set compute=emulate "
                "(the definition, on any device) or compute=auto."
            )
        if "measured" in row.todo:
            names = row.config.metrics.names
            needing = [name for name in names if metrics.find_metric(name).NEEDS == "real"]
            if needing and row.config.data.real is None:
                raise LoraqError(
                    f"metrics.names: {', '.join(needing)} compare with real images, and data.real "
                    "is null. Set data.real=FOLDER or leave them out (metrics=paired)."
                )
            options = {"extractor": row.config.metrics.extractor, "device": row.device}
            metrics.check_metrics(names, real_images(row.config) if needing else None, **options)
    made = [row for row in rows if "quantised" in row.todo]
    if not made:
        return
    import torch

    transformer = meta_transformer(made[0].config.model)
    for row in made:
        assert row.recipe is not None
        try:
            layers = list_layers(transformer, row.config.model.family, row.recipe.skip)
            rank, _ = planned_branch_bits(layers, row.recipe)
            if row.config.compute == "triton":
                formats, requantize = row.recipe.formats(), row.recipe.requantize_intermediate
                widths = (layer.shape[1] for layer in layers)
                check_compute(formats, requantize, rank, widths, torch.device(row.device))
        except LoraqError as error:
            raise LoraqError(f"{error}\n  (in row '{row.name}')") from None
