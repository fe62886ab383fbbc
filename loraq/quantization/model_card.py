"""The model card of a saved checkpoint: README.md with the YAML header that the hub reads.

It is written beside every packed model or pipeline that diffusers saves, and says what is in the
files: formats, memory, what is not quantised, recipe, versions; scores if a run has measured them,
also after loading and saving again, as long as the tensors are the same.
Equal models have equal cards. A README.md that is not a card of ours is never overwritten.
"""

from __future__ import annotations

import inspect
import logging
import math
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from torch import nn

import loraq
from loraq.formats import Format
from loraq.layers.serialization import expected_tensors
from loraq.models.denoisers import dtype_of, joined, parts
from loraq.quantization.card_file import (
    CARD,
    TENSORS,
    hash_of_tensors,
    is_card,
    read_source,
    signed,
)
from loraq.quantization.diffusers_config import PackedConfig
from loraq.quantization.made_from import network_of
from loraq.utils.files import write_text
from loraq.utils.plain import to_plain

log = logging.getLogger(__name__)

MADE_WITH = ("torch", "diffusers", "safetensors")
_NOT_MEASURED = "Not measured. `loraq score FOLDER` measures a saved pipeline."


def write_card_of_save() -> None:
    """Write the card of the model or pipeline that diffusers is saving, into its folder.

    diffusers tells a quantizer neither of them, so both are read from the calls that are running.
    A pipeline's `save_pretrained` calls those of its models: the card is the pipeline's.
    """
    from diffusers import DiffusionPipeline, ModelMixin  # heavy

    saves = {owner.save_pretrained.__code__ for owner in (ModelMixin, DiffusionPipeline)}
    frame, outermost = inspect.currentframe(), None
    while frame is not None:
        if frame.f_code in saves:
            outermost = frame.f_locals
        frame = frame.f_back
    if outermost is not None and outermost.get("is_main_process", True):
        write_card(outermost["self"], Path(outermost["save_directory"]))


def write_card(owner: Any, folder: Path, scores: str = "", use: str = "") -> None:
    """Write the card of a packed model or pipeline to `folder`; a README.md of others stays.

    scores: Markdown, what was measured. use: what the files are, if their layout is another
    program's; the card then states no bytes. Writes nothing for a model that is not of diffusers.
    """
    if not any(map(_config_of, parts(network_of(owner)).values())):
        return
    path = folder / CARD
    if path.exists() and not is_card(path.read_bytes()):
        log.info("'%s' is no card by LoRaQ, or was edited, and stays as it is.", path)
        return
    write_text(path, signed(model_card(owner, scores, use)))


def model_card(owner: Any, scores: str = "", use: str = "") -> str:
    """The text of the card of a packed model or pipeline."""
    networks = parts(network_of(owner))
    configs = {part: _config_of(network) for part, network in networks.items()}
    packed = {part: config for part, config in configs.items() if config is not None}
    of_parts = {part: config.layer_entries() for part, config in packed.items()}
    entries = {joined(part, n): entry for part, own in of_parts.items() for n, entry in own.items()}
    recipe = next(config.recipe for config in packed.values())
    quantized = next(network for part, network in networks.items() if part in packed)
    source = read_source(owner, quantized)
    base = source.base
    formats = _labels(entries.values(), "weight")
    header = {
        **({"base_model": base, "base_model_relation": "quantized"} if base else {}),
        "library_name": "diffusers",
        **source.licence,
        "tags": ["loraq", "quantized", *dict.fromkeys(label.split()[0] for label in formats)],
    }
    kind = type(owner).__name__
    made_from = f"`{base}`" if base else f"a `{kind}` in 16 bits"
    facts = _facts(entries)
    if not use:
        facts |= _memory(entries, sum(map(_nbytes, of_parts.values())))
    made_with = [("loraq", loraq.__version__), *((name, version(name)) for name in MADE_WITH)]
    facts["made with"] = ", ".join(f"{name} {number}" for name, number in made_with)
    sections = {
        "Use": use or _usage(owner, dtype_of(next(iter(networks.values())))),
        "Scores": _NOT_MEASURED if use else _scores(owner, scores, source.scores),
        "Not quantised": _not_quantised(owner, networks, entries),
        "Recipe": "Not known."
        if recipe is None
        else f"```yaml\n{yaml.safe_dump(to_plain(recipe), sort_keys=True)}```",
    }
    return (
        f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n\n"
        f"# {base or kind}, quantised with LoRaQ\n\n| | |\n|---|---|\n| made from | {made_from} |\n"
        + "".join(f"| {name} | {value} |\n" for name, value in facts.items())
        + "".join(f"\n## {title}\n\n{text}\n" for title, text in sections.items())
    )


def _config_of(network: Any) -> PackedConfig | None:
    """The configuration of a packed network; None for one in 16 bits."""
    config = getattr(getattr(network, "hf_quantizer", None), "quantization_config", None)
    return config if isinstance(config, PackedConfig) else None


def _nbytes(entries: Mapping[str, Any]) -> int:
    """Stored bytes of the layers of one network, without biases."""
    stored = expected_tensors(entries).items()
    return sum(t.numel() * t.element_size() for n, t in stored if not n.endswith(".bias"))


def _memory(entries: Mapping[str, Any], nbytes: int) -> dict[str, str]:
    return {
        "bits per weight": f"{8 * nbytes / _weights(entries):.3f}, scales and branch included",
        "bytes": f"{nbytes:,} of the quantised layers, without biases",
    }


def _weights(entries: Mapping[str, Any]) -> int:
    return sum(math.prod(entry["weight"]["shape"]) for entry in entries.values())


def _facts(entries: Mapping[str, Any]) -> dict[str, str]:
    ranks = sorted({e["left"]["shape"][1] if "left" in e else 0 for e in entries.values()})
    branch = "none"
    if ranks != [0]:
        branch = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        factors = ", ".join(_labels(entries.values(), "left"))
        inputs = ", ".join(_labels(entries.values(), "branch_activation"))
        branch = f"{branch}; factors {factors}, their inputs {inputs}"
    return {
        "quantised layers": f"{len(entries)}, with {_weights(entries):,} weights",
        "weights": ", ".join(_labels(entries.values(), "weight")),
        "activations": ", ".join(_labels(entries.values(), "activation")),
        "low-rank branch": branch,
    }


def _labels(entries: Iterable[Mapping[str, Any]], operand: str) -> list[str]:
    """The distinct formats of an operand, as tables show them."""
    held = (entry.get(operand) for entry in entries)
    return [*dict.fromkeys(Format(**h.get("format", h)).label for h in held if h is not None)]


def _not_quantised(
    owner: Any, networks: Mapping[str, nn.Module], entries: Mapping[str, Any]
) -> str:
    """What keeps its type: matrices of the networks, blocks counted as `*`, and components."""
    kept: dict[str, int] = {}
    for part, network in networks.items():
        for name, parameter in network.named_parameters():
            if parameter.dim() > 1:
                module = joined(part, name.removesuffix(".weight"))
                pattern = re.sub(r"\.\d+(?=\.|$)", ".*", module)
                kept[pattern] = kept.get(pattern, 0) + parameter.numel()
    lines = [f"- `{name}`: {count:,} weights" for name, count in kept.items()]
    components = getattr(owner, "components", {})
    others = {
        name: module
        for name, module in components.items()
        if isinstance(module, nn.Module) and module not in [*networks.values()]
    }
    lines += [f"- `{name}` ({type(module).__name__})" for name, module in others.items()]
    return "\n".join(lines) or "Nothing."


def _usage(owner: Any, dtype: Any) -> str:
    kind, module = type(owner).__name__, type(owner).__module__
    package = "diffusers" if module.startswith("diffusers.") else module
    return (
        "```python\nimport torch\n\n"
        "import loraq.diffusers_quantizer  # makes the packed layers known to diffusers\n"
        f"from {package} import {kind}\n\n"
        f'model = {kind}.from_pretrained("FOLDER", dtype={dtype})\n```\n\n'
        "FOLDER is that of this file, or its name on the hub. The packed layers run on any device."
    )


def _scores(owner: Any, measured: str, before: str) -> str:
    """`measured`, else the scores `before` of what `owner` was loaded from, if they are its own."""
    if measured:
        return f"{measured}\n\nMeasured with {TENSORS}`{hash_of_tensors(owner)}`."
    if TENSORS not in before:
        return _NOT_MEASURED
    if hash_of_tensors(owner) in before:
        return before
    return f"{_NOT_MEASURED} What this was loaded from has scores, but other tensors or dtypes."
