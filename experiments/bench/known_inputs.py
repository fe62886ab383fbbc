"""What `statistics=weights` gains on any transformer, beside nearest rounding and measured moments.

    python -m experiments.bench.known_inputs [--models flux … tiny_sana] [--output FILE.json]

Models: the embedded ones, which are trained, and the little pipelines of `tests/pipelines/`, of
random weights. Layers whose inputs the weights determine are quantised to W4A4 after a rotation: by
nearest rounding, and with balanced smoothing and GPTQ, which read the second moment H = E[xᵀx]
from the weights or from the first captions. Reports, apart for inputs that are normalisations and
those that are attentions' outputs,

    output_error   mean over layers on other captions and noise
    moment_error   ‖H − M‖/‖M‖ of each H, where M is measured and all have M's trace. `flat` is a
                   multiple of the identity; `text` adds the mean of the captions' pooled text to
                   the timestep's embedding, where the model is given one.

Expected time: two minutes on 2 cores. Outcome: results/bench/known_inputs.json, docs/method.md.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from loraq import recipe
from loraq.compose import load_rows
from loraq.config import ModelConfig
from loraq.data import Prompt, data_prompts
from loraq.models import Layer, list_layers, load_pipeline
from loraq.models.denoisers import denoiser_of, parts
from loraq.models.family import find_family
from loraq.models.known_inputs import known_inputs
from loraq.models.layers import family_of
from loraq.models.moments import Moment
from loraq.quantization.activations import Activations
from loraq.quantization.calibration import InputCapture, MomentCapture
from loraq.quantization.layer_errors import layer_errors
from loraq.quantization.quantizer import quantize_model
from loraq.results import record
from loraq.runner.generate import image_batch
from tests import pipelines

TRAINED = ("tiny_pixart", "tiny_sana")
ROTATED = "quant.transform.hadamard=64"
NEAREST = recipe("rtn", ROTATED)
FROM_MOMENTS = recipe("gptq", ROTATED, "quant.transform.smooth=balanced")
PROMPTS, ROWS, STEPS = 4, 1024, 8
WORDS = ("a red cat", "one blue dog", "a green fish", "one red fish")
"""Captions of the little pipelines, whose tokenizers know few other words."""

Known = Mapping[str, Moment]


def find_model(name: str) -> tuple[ModelConfig, Sequence[Prompt]]:
    """The settings of a model, and captions: the first to measure H, as many others for errors."""
    if name in TRAINED:
        row = load_rows(["method=reference", f"model={name}"])[0]
        return row.model, data_prompts(row.data)[: 2 * PROMPTS]
    steps = () if name == "sana_sprint" else (f"model.steps={STEPS}",)  # its default needs two
    model = load_rows(["method=reference", *pipelines.overrides(name), *steps])[0].model
    texts = (*WORDS, *reversed(WORDS))
    return model, [Prompt(f"{number}", text) for number, text in enumerate(texts)]


def measure_model(name: str) -> list[dict[str, Any]]:
    """The rows of a model: layers behind normalisations, then those behind attentions."""
    model, prompts = find_model(name)
    pipe = load_pipeline(model, "cpu")
    denoiser = denoiser_of(pipe)
    known = _known(denoiser)
    layers = [x for x in list_layers(denoiser, family_of(denoiser)) if x.shares_input in known]
    moments, pooled = MomentCapture(denoiser, layers), _PooledText(denoiser)
    with torch.inference_mode(), moments, pooled:
        image_batch(pipe, model, prompts[:PROMPTS], 0, "latent")
    inputs = InputCapture(denoiser, layers, ROWS, model.step_count, 0)
    with torch.inference_mode(), inputs:
        image_batch(pipe, model, prompts[PROMPTS:], 1, "latent")
    measured, rows = moments.moments(), inputs.inputs()
    layers = [layer for layer in layers if layer.shares_input in rows]  # of experts that ran
    estimates = {"weights": known, "flat": {i: _flat(m) for i, m in measured.items()}}
    if pooled.seen:
        estimates["text"] = _known(pooled.added())
    shared = {
        "model": name,
        "class": type(next(iter(parts(denoiser).values()))).__name__,
        "trained": name in TRAINED,
    }
    found = []
    for kind, chosen in _kinds(layers).items():
        errors = {
            "nearest": _output_error(denoiser, chosen, rows, None),
            "weights": _output_error(denoiser, chosen, rows, known),
            "measured": _output_error(denoiser, chosen, rows, measured),
        }
        ids = sorted({layer.shares_input for layer in chosen})
        moment_error = {
            source: fmean(_distance(values[i], measured[i]) for i in ids)
            for source, values in estimates.items()
        }
        counts = {"inputs": kind, "layers": len(chosen)}
        found.append(shared | counts | {"output_error": errors, "moment_error": moment_error})
    return found


def _known(denoiser: nn.Module) -> Known:
    """What the weights determine, as quantising finds it."""
    family = find_family(family_of(denoiser))
    own = family.known_inputs
    return known_inputs(denoiser, family) if own is None else own(denoiser)


def _kinds(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    kinds: dict[str, list[Layer]] = {}
    for kind in ("normalisations", "attentions"):
        of_kind = [x for x in layers if x.role.endswith("_out") == (kind == "attentions")]
        if of_kind:
            kinds[kind] = of_kind
    return kinds


def _output_error(
    denoiser: nn.Module, layers: Sequence[Layer], rows: Mapping[str, Tensor], moments: Known | None
) -> float:
    chosen = NEAREST if moments is None else FROM_MOMENTS
    made = quantize_model(denoiser, layers, chosen, Activations(moments=moments), progress=None)
    return fmean(row["output_error"] for row in layer_errors(made, denoiser, layers, rows))


def _flat(moment: Moment) -> Moment:
    return Moment(torch.eye(len(moment.mean_I)), torch.zeros_like(moment.mean_I))


def _distance(moment: Moment, measured: Moment) -> float:
    h_II, m_II = (x.second_II.double() / x.second_II.trace() for x in (moment, measured))
    return float((h_II - m_II).norm() / m_II.norm())


class _PooledText:
    """Context manager: the mean pooled text that a transformer is given, if it reads one."""

    def __init__(self, denoiser: nn.Module) -> None:
        self.seen: list[Tensor] = []
        self._denoiser = denoiser
        named = denoiser.named_modules()
        self._name = next((n for n, _ in named if n.endswith("time_text_embed.text_embedder")), "")

    def __enter__(self) -> _PooledText:
        if self._name:
            module = self._denoiser.get_submodule(self._name)
            self._handle = module.register_forward_pre_hook(
                lambda _, args: self.seen.append(args[0].float())
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._name:
            self._handle.remove()

    def added(self) -> nn.Module:
        """A copy of the transformer to which a text of zeros means the mean of those seen."""
        network = copy.deepcopy(self._denoiser)
        first: Any = network.get_submodule(f"{self._name}.linear_1")
        with torch.no_grad():
            first.bias += first.weight.float() @ torch.cat(self.seen).mean(0)
        return network


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [*TRAINED, *pipelines.names()]
    parser.add_argument("--models", nargs="+", default=names, choices=names, metavar="NAME")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    rows = []
    for name in options.models:
        for row in measure_model(name):
            where = f"{name}, {row['layers']} layers behind {row['inputs']}"
            errors = (f"{key} {value:.3f}" for key, value in row["output_error"].items())
            print(f"{where}: {', '.join(errors)}", flush=True)
            rows.append(row)
    if options.output is not None:
        settings = {"prompts": PROMPTS, "rows": ROWS, "steps": STEPS}
        record.save_findings({"settings": settings, "rows": rows}, options.output)


if __name__ == "__main__":
    main()
