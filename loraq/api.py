"""The public Python API: `loraq.recipe` and `loraq.quantize` for any diffusers pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

import torch

from loraq.compose import recipe
from loraq.config import CalibrationConfig, GenerateConfig, Recipe
from loraq.errors import LoraqError
from loraq.models.adapters import adapter_bytes
from loraq.models.call import check_call
from loraq.models.denoisers import denoiser_of, denoisers_of, dtype_of, gathered, parts
from loraq.models.family import recipe_for
from loraq.models.finite import check_finite, check_pipeline
from loraq.models.layers import Layer, family_of, list_layers
from loraq.quantization.activations import Activations
from loraq.quantization.adapters import AdapterChoice, without_adapters
from loraq.quantization.calibration import InputCapture, MomentCapture
from loraq.quantization.model import QuantizedModel
from loraq.quantization.quantizer import quantize_model
from loraq.utils.texts import list_of_texts

__all__ = ["quantize", "recipe"]

_preset = recipe  # `quantize` has an argument of the name `recipe`


def quantize(
    pipe: Any,
    recipe: Recipe | str = "loraq_o2",
    *,
    prompts: Sequence[str] | None = None,
    call: Mapping[str, Any] | None = None,
    rows_per_layer: int = 2048,
    batch_size: int = 16,
    family: str | None = None,
    checkpoint_dir: str | Path | None = None,
    adapters: AdapterChoice = "refuse",
    progress: bool = True,
) -> QuantizedModel:
    """Quantise a diffusers pipeline's transformer, or experts, in place; undo with `.revert(pipe)`.

    recipe: a `Recipe`, or the name of a preset (`loraq_o2`, `svdquant`, `rtn`, …).
    prompts: captions for recipes that read activations; the 16-bit pipeline generates from them
        with the keyword arguments `call` (steps, guidance, size …).
    rows_per_layer: token rows sampled per layer input. batch_size: prompts per pipeline call.
    family: model family, for a transformer whose class belongs to none.
    checkpoint_dir: finished groups of layers are saved here, and a later call resumes from them.
    adapters: what becomes of LoRA that is loaded: "refuse", an error; "fuse", merged into the
        16-bit weights as by peft, then quantised with them; "keep", left in 16 bits beside the
        packed layers, and removable. With "keep", recipes read weights and inputs without it.
    progress: whether to show a progress bar.

    Raises LoraqError if a recipe that reads activations has no prompts, or a data-free one has, and
    for an argument of the wrong type or out of range, and for weights that are NaN, infinite or not
    in memory.
    """
    import loraq.diffusers_quantizer  # noqa: F401  (diffusers loads what is saved, and quantises)

    listed = [] if prompts is None else list_of_texts(prompts, "prompts")
    transformer = _transformer_of(pipe)
    _check_arguments(pipe, recipe, listed, call, rows_per_layer, batch_size)
    chosen = _preset(recipe) if isinstance(recipe, str) else recipe
    with without_adapters(transformer, adapters) as fuse:
        family = family_of(transformer, family)
        chosen = recipe_for(chosen, family, dtype_of(transformer))
        layers = list_layers(transformer, family, chosen.skip)
        if chosen.needs_calibration and not listed:
            raise LoraqError(
                "This recipe reads activations of the 16-bit model (smoothing, GPTQ, a weighted "
                "branch or select=output). Pass prompts=[…], or use a data-free recipe such as "
                "loraq_o2."
            )
        if listed and not chosen.needs_calibration:
            raise LoraqError(
                f"{len(listed)} prompts were given, but this recipe is data-free and does not read "
                "them. Remove prompts=."
            )
        if chosen.needs_sensitivity:
            raise LoraqError(
                "quant.allocation.sensitivity=activations is measured only by `loraq run`. Use "
                "quant.allocation.sensitivity=weights here."
            )
        fuse()
        for part, network in parts(transformer).items():
            check_finite(network, part or "transformer")
        read = None
        if listed:
            check_pipeline(pipe)
            read = _capture(pipe, layers, listed, dict(call or {}), rows_per_layer, batch_size)
        folder = None if checkpoint_dir is None else Path(checkpoint_dir)
        bar = "quantise" if progress else None
        model = quantize_model(transformer, layers, chosen, read, folder, bar, family)
        model.apply(transformer)
        try:
            model.check_called(transformer)
        except BaseException:
            model.revert(transformer)
            raise
    model.adapters = adapter_bytes(transformer)
    return model


_RESERVED = {
    "prompt": "captions are given as prompts=[…]",
    "generator": "every batch has its own seed",
    "output_type": "calibration reads the transformer, and decodes no images",
}


def _check_arguments(
    pipe: Any,
    recipe: Any,
    prompts: Sequence[str],
    call: Mapping[str, Any] | None,
    rows_per_layer: int,
    batch_size: int,
) -> None:
    """LoraqError for an argument of the wrong type, out of range, or without effect."""
    if not isinstance(recipe, Recipe | str):
        raise LoraqError(
            f"recipe={recipe!r} is not a recipe. Give the name of a preset, such as 'loraq_o2', or "
            "a loraq.Recipe (loraq.recipe makes one)."
        )
    CalibrationConfig(rows_per_layer=rows_per_layer)  # the limits of the settings
    GenerateConfig(batch_size=batch_size)
    if not isinstance(call, Mapping | NoneType):
        raise LoraqError(
            f"call={call!r} must be keyword arguments of the pipeline, such as {{'height': 512}}."
        )
    if call and not prompts:
        raise LoraqError(
            f"call={dict(call)!r:.80} has no effect without prompts=[…]. Leave it out, or pass "
            "prompts to a recipe that reads activations."
        )
    if call:
        check_call(pipe.__call__, call, _RESERVED, "call")


def _transformer_of(pipe: Any) -> torch.nn.Module:
    """The pipeline's transformer or experts; LoraqError for anything else."""
    kind = type(pipe).__name__
    if isinstance(pipe, torch.nn.Module):
        raise LoraqError(
            f"loraq.quantize takes a pipeline and got a {kind}. Pass the pipeline that it belongs "
            "to (pipe, not pipe.transformer)."
        )
    networks = denoisers_of(pipe)
    if not networks:
        raise LoraqError(
            f"loraq.quantize takes a pipeline with a transformer, and this {kind} has none. Load a "
            "diffusion transformer's pipeline with all of its components."
        )
    return gathered(networks, kind)


def _capture(
    pipe: Any,
    layers: Sequence[Layer],
    prompts: Sequence[str],
    call: dict[str, Any],
    rows_per_layer: int,
    batch_size: int,
) -> Activations:
    """Rows and moments of the layers' inputs while the pipeline generates from `prompts`."""
    batches = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
    steps = inspect.signature(pipe.__call__).parameters.get("num_inference_steps")
    usual = None if steps is None else steps.default
    forwards = len(batches) * (call.get("num_inference_steps") or usual or 20)
    with (
        torch.inference_mode(),
        InputCapture(denoiser_of(pipe), layers, rows_per_layer, forwards, seed=0) as rows,
        MomentCapture(denoiser_of(pipe), layers) as moments,
    ):
        for number, batch in enumerate(batches):
            generator = torch.Generator("cpu").manual_seed(number)
            pipe(prompt=list(batch), generator=generator, output_type="latent", **call)
    return Activations(rows=rows.inputs(), moments=moments.moments())
