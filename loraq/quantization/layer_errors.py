"""Weight and output errors of quantised layers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loraq.formats.quantization import all_finite
from loraq.models.layers import Layer
from loraq.models.pointwise import weight_matrix
from loraq.quantization.model import QuantizedModel

log = logging.getLogger(__name__)

SMALLEST = 1e-30  # least norm to divide by: a layer of zeros that stays zero has the error 0


@torch.no_grad()
def layer_errors(
    model: QuantizedModel,
    transformer: nn.Module,
    layers: Sequence[Layer],
    inputs: Mapping[str, Tensor],
) -> list[dict[str, Any]]:
    """Per layer ‖W − Ŵ‖/‖W‖ and ‖Y − Ŷ‖/‖Y‖ (Y without bias), in the original basis.

    transformer: the 16-bit model; inputs: input id → (rows, in), its activations on captions that
    calibration does not use. Rows that the 16-bit model leaves non-finite, such as masked tokens,
    are not counted; layers that no step ran have no output error. A warning says so.
    """
    rows: list[dict[str, Any]] = []
    errors: list[Tensor] = []
    used = dict.fromkeys(layer.shares_input for layer in layers)
    finite = {name: _finite_rows(name, inputs[name]) for name in used if name in inputs}
    if idle := [layer.name for layer in layers if layer.shares_input not in finite]:
        log.warning(
            "No step of the 16-bit model runs %d of %d quantised layers, such as '%s': they have "
            "no output error, and do not change these images. Raise model.steps to see theirs.",
            *(len(idle), len(layers), idle[0]),
        )
    for layer in layers:
        linear = transformer.get_submodule(layer.name)
        w_OI = weight_matrix(linear).float()
        x_TI = finite.get(layer.shares_input, w_OI.new_empty(0, w_OI.shape[1]))
        x_TI = x_TI.to(w_OI.device).float()
        tensors = model.layers[layer.name].to(x_TI.device)
        y_TO = x_TI @ w_OI.T
        offset = 0.0 if linear.bias is None else linear.bias.float()
        error = tensors.forward(x_TI) - offset - y_TO
        weight_error = (tensors.effective_weight() - w_OI).norm() / w_OI.norm().clamp_min(SMALLEST)
        errors += [weight_error, error.norm() / y_TO.norm().clamp_min(SMALLEST)]
        rows.append({"layer": layer.name, "role": layer.role})
    if errors:  # read at once: the host waits once for a GPU
        for row, found in zip(rows, torch.stack(errors).view(-1, 2).tolist(), strict=True):
            row["weight_error"], row["output_error"] = found
    for row, layer in zip(rows, layers, strict=True):
        if layer.shares_input not in finite:
            del row["output_error"]
    return rows


def _finite_rows(input_id: str, x_TI: Tensor) -> Tensor:
    if all_finite(x_TI):
        return x_TI
    finite_T = x_TI.isfinite().all(-1)
    log.warning(
        "%d of %d captured rows of input '%s' contain NaN or Inf in the 16-bit model; output "
        "errors are measured on the other rows.",
        int((~finite_T).sum()),
        len(x_TI),
        input_id,
    )
    return x_TI[finite_T]
