"""The plan: which products exist, which have to be made, and checks before anything runs.

Reads only configurations, files and manifests; loads no weights.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Sequence

from loraq.config import Config
from loraq.data import calibration_prompts, data_prompts
from loraq.errors import LoraqError
from loraq.formats.operator import check_kernel
from loraq.layers.backends import check_compute
from loraq.metrics.common.features import FeatureSet
from loraq.metrics.common.image_set import ImageSet
from loraq.metrics.common.published import missing_weights
from loraq.metrics.common.weights import Weights
from loraq.metrics.registry import check_kind, check_metrics, find_metric, needs_real
from loraq.models.call import check_model_call, check_text
from loraq.models.contents import check_contents
from loraq.models.hub import in_cache
from loraq.models.layers import list_layers
from loraq.models.loading import check_size, denoisers_in, meta_denoiser
from loraq.models.outputs import check_outputs, output_kind
from loraq.models.quantizers import check_quantizers
from loraq.models.source import pipeline_of
from loraq.quantization.budget import planned_branch_bits
from loraq.runner.other_gpus import report_other_gpus, with_other_gpus
from loraq.runner.product_keys import find_device, make_row
from loraq.runner.real_images import real_images
from loraq.runner.rows import ACTIVATIONS, Row, Stage
from loraq.runner.store import Store
from loraq.utils import batch_invariance
from loraq.utils.kinds import Kind
from loraq.utils.process import own_gpu
from loraq.utils.user_module import is_user_file, load_user_module

log = logging.getLogger(__name__)


def plan_rows(configs: Sequence[Config], store: Store, last: Stage = Stage.RECORD) -> list[Row]:
    """The rows with their keys and missing stages (`Row.todo`), up to stage `last`.

    Verifies the checksums of all existing products. The store reports a corrupted product and
    renames it; it is planned again. LoraqError before a model is downloaded in vain.
    """
    if last is Stage.RECORD:
        check_inputs(configs)
    batch_invariance.configure_cpu_math()
    rows = [make_row(config) for config in configs]
    state: dict[tuple[str, str], bool] = {}

    def finished(stage: Stage, row: Row) -> bool:
        product = row.product(stage)
        if product not in state:
            state[product] = store.finished(*product, row.pieces(stage))
        return state[product]

    planned = []
    for row in rows:
        exists = {stage: finished(stage, row) for stage in row.stages}
        planned.append(dataclasses.replace(row, todo=_todo(row, exists, store, last)))
    planned = with_other_gpus(planned, store)
    if not store.read_only:
        report_other_gpus(planned)
    return planned


def check_inputs(configs: Sequence[Config]) -> None:
    """LoraqError for a domain, prompts or metrics for which a model would be downloaded in vain."""
    for config in configs:
        check_domain(config)
    for config in configs:
        if config.model.hub_id is not None and not in_cache(config.model):
            if config.calibration.text != "random":  # read from the model's tokenizer
                calibration_prompts(config.data, config.calibration, config.model)
            check_measuring(config, _shorter_side(config), find_device(config))


def _todo(row: Row, exists: dict[Stage, bool], store: Store, last: Stage) -> frozenset[Stage]:
    """The stages to make, given which products exist."""
    todo = {stage for stage in exists if row.product(stage) in store.corrupted}
    wanted = {Stage.RECORD: (Stage.IMAGES, Stage.RECORD), Stage.IMAGES: (Stage.IMAGES,)}
    todo |= {stage for stage in wanted.get(last, ()) if not exists[stage]}
    if Stage.IMAGES in todo and not exists[Stage.EMBEDDINGS]:
        todo.add(Stage.EMBEDDINGS)
    if Stage.RECORD in todo and not exists[Stage.MEASURED]:
        todo.add(Stage.MEASURED)
    if row.recipe is None:
        return frozenset(todo)
    reads_layers = todo & {Stage.IMAGES, Stage.MEASURED} or last is Stage.QUANTIZED
    if reads_layers and not exists[Stage.QUANTIZED]:
        todo.add(Stage.QUANTIZED)
    if Stage.MEASURED in todo and not exists[Stage.MEASURING_INPUTS]:
        todo.add(Stage.MEASURING_INPUTS)
    if Stage.QUANTIZED in todo:
        todo |= {s for s in ACTIVATIONS[:-1] if s in exists and not exists[s]}
    return frozenset(todo)


def check_rows(rows: Sequence[Row]) -> None:
    """LoraqError for a call, metrics, real images, models, layers or ranks that would fail."""
    with own_gpu("cuda" if any(row.device == "cuda" for row in rows) else "cpu"):
        for row in rows:
            if row.todo:
                check_model_call(pipeline_of(row.config.model), row.config.model)
            if row.todo - {Stage.QUANTIZED, Stage.IMAGES, Stage.MEASURED, Stage.RECORD}:
                check_text(pipeline_of(row.config.model), row.config.model)
        _check_models(rows)
        for row in rows:
            if row.todo - {Stage.QUANTIZED, Stage.MEASURED, Stage.RECORD}:
                check_size(row.config.model)
        _check_metrics(rows)
        generating = [row.config.model for row in rows if Stage.IMAGES in row.todo]
        for sentence in dict.fromkeys(one for model in generating for one in check_outputs(model)):
            log.warning(sentence)
        quantizing = {Stage.QUANTIZED, Stage.IMAGES, Stage.MEASURED}
        for device in {row.device for row in rows if row.recipe and row.todo & quantizing}:
            check_kernel(device)
        quantized = [row for row in rows if Stage.QUANTIZED in row.todo]
        report_calibration([row.config for row in quantized])
        _check_layers(quantized)


def _check_metrics(rows: Sequence[Row]) -> None:
    readable: set[str] = set()
    for row in rows:
        if row.config.compute == "triton" and row.device == "cpu":
            raise LoraqError(
                "compute=triton needs a GPU, and this run is on the CPU. Set compute=emulate "
                "(the reference implementation, on any device) or compute=auto."
            )
        if Stage.MEASURED in row.todo:
            real = check_measuring(row.config, _shorter_side(row.config), row.device)
            if isinstance(real, ImageSet) and real.hash not in readable:
                real.sizes(row.config.metrics.workers)
                readable.add(real.hash)


def _shorter_side(config: Config) -> int | None:
    """Of the images in pixels; None for a model without a size."""
    return None if config.model.size is None else min(config.model.size)


def check_measuring(
    config: Config, side: int | None, device: str, kind: Kind | None = None
) -> ImageSet | FeatureSet | None:
    """The real images that the metrics need, if any; LoraqError if one cannot be computed.

    side: the shorter one of the images in pixels, or the samples of a clip; None: not known yet.
    kind: of the outputs; None: what the model makes.
    """
    kind = kind or output_kind(config.model)
    check_kind(config.metrics.names, kind)
    names, needing = config.metrics.names, needs_real(config.metrics.names)
    check_domain(config)
    if needing and config.data.real is None:
        others = ",".join(name for name in names if name not in needing)
        raise LoraqError(
            f"metrics.names: {', '.join(needing)} need real images, but data.real is null. "
            f"Set data.real=FOLDER or leave them out: metrics.names=[{others}]"
        )
    real, prompts = real_images(config) if needing else None, data_prompts(config.data)
    if real is not None:
        real = real.of_names([prompt.name for prompt in prompts])
    options = {"extractor": config.metrics.extractor, "device": device}
    check_metrics(names, len(prompts), side, real, kind, **options)
    return real


def weights_to_fetch(configs: Iterable[Config]) -> list[Weights]:
    """The published weights that measuring needs and that are not downloaded yet."""
    wanted = dict.fromkeys((c.metrics.names, c.metrics.extractor) for c in configs)
    return list(dict.fromkeys(weights for one in wanted for weights in missing_weights(*one)))


def to_measure(rows: Sequence[Row]) -> list[Config]:
    """The configurations of the rows whose values are not measured yet."""
    return [row.config for row in rows if Stage.MEASURED in row.todo]


def check_domain(config: Config) -> None:
    """LoraqError for prompts, real images or a metric's network of another domain than the model's.

    The domains are those of the YAML files; without one, anything fits.
    """
    model, data = config.model, config.data
    wanted = model.domain
    if wanted and data.domain and data.domain != wanted:
        raise LoraqError(
            f"Model '{model.name}' makes {wanted}, and data.captions={data.captions} are prompts "
            f"and images of {data.domain}: measured against each other they mean nothing. Add "
            "data=mjhq data.captions=FOLDER (`loraq fetch mjhq FOLDER` downloads it), or data=file "
            "data.captions=FILE for a list of your own. If the captions are of another domain than "
            "that, set data.domain=null."
        )
    others = [
        name
        for name in config.metrics.names
        if wanted and getattr(find_metric(name), "DOMAIN", wanted) != wanted
    ]
    if others:
        trained = getattr(find_metric(others[0]), "DOMAIN", "")
        kept = ",".join(name for name in config.metrics.names if name not in others)
        raise LoraqError(
            f"metrics.names: the network of {', '.join(others)} was trained on {trained}, and "
            f"model '{model.name}' makes {wanted}. Set metrics.names=[{kept}]."
        )


def report_calibration(configs: Iterable[Config]) -> None:
    """A warning if a calibrated method reads captions of another domain than the model's."""
    for config in configs:
        model, data, recipe = config.model, config.data, config.quant
        reads = recipe and (recipe.needs_rows or recipe.needs_moments)
        of_data = config.calibration.captions is None and config.calibration.text == "captions"
        if reads and of_data and model.domain and data.domain not in (None, model.domain):
            log.warning(
                "method=%s calibrates on captions of %s (data.captions=%s), and model '%s' makes "
                "%s. Choose others with data= and data.captions=, or with calibration.set= and "
                "calibration.captions=.",
                *(config.method, data.domain, data.captions, model.name, model.domain),
            )
            return


def _check_models(rows: Sequence[Row]) -> None:
    """The files of the models that the rows load: all of them, or the denoisers' alone."""
    for row in rows:
        loading = row.todo - {Stage.RECORD}
        if loading:
            check_quantizers(row.config.model, row.device)
            only = denoisers_in(row.config.model) if loading == {Stage.QUANTIZED} else None
            check_contents(row.config.model, only)


def _check_layers(made: Sequence[Row]) -> None:
    """The layers, ranks and kernels of the rows that are to be quantised; no weights are read."""
    if not made:
        return
    import torch

    denoiser = meta_denoiser(made[0].config.model)
    for row in made:
        assert row.recipe is not None
        try:
            if is_user_file(row.recipe.branch.kind):
                load_user_module(row.recipe.branch.kind, "find")
            layers = list_layers(denoiser, row.config.model.family, row.recipe.skip)
            rank, _ = planned_branch_bits(layers, row.recipe)
            if row.config.compute == "triton":
                formats, requantize = row.recipe.formats(), row.recipe.requantize_intermediate
                widths = (layer.shape[1] for layer in layers)
                check_compute(formats, requantize, rank, widths, torch.device(row.device))
        except LoraqError as error:
            raise LoraqError(f"{error}\n  (in row '{row.name}')") from None
