"""Whether a folder holds the model it is taken for: classes, and every tensor of every network.

transformers initialises a missing tensor at random, and both libraries ignore tensors that the
architecture does not have. Here the names and shapes in the files' headers are compared with the
networks on the meta device, before any weight is read.
"""

from __future__ import annotations

import functools
import inspect
import json
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from loraq.config import ModelConfig
from loraq.errors import LoraqError
from loraq.models.component_names import denoiser_names, require_denoiser
from loraq.models.family import find_family
from loraq.models.files import (
    Header,
    components,
    file_problem,
    file_problems,
    has_weights,
    read_header,
    read_json,
    sizes_and_times,
    weight_files,
)
from loraq.models.hub import listed_problems
from loraq.models.networks import compare_with_files, network_class
from loraq.models.parts import check_classes, check_parts
from loraq.models.source import pipeline_of, resolve_folder

_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "BOOL")
_REMEDY = "Restore these files, or use a complete copy of the model."


def check_contents(model: ModelConfig, only: Collection[str] | None = None) -> None:
    """LoraqError unless the model's files hold all components, or `only` these, of its family.

    Reads no weights: only JSON files and the headers of safetensors files.
    """
    folder, table = resolve_folder(model), find_family(model.family)
    pipeline = pipeline_of(model)
    listed = components(folder)
    _check_listed(folder, pipeline, listed)
    check_classes(folder)  # by which a component is known to have weights
    if problems := file_problems(folder, model.variant, only):
        raise LoraqError(
            f"'{folder}' is incomplete: {listed_problems(problems)}\n  {_REMEDY} Pickled weights "
            "(.bin) are not read; save the pipeline again with safe_serialization=True."
        )
    if only is None:
        check_parts(folder)
        _check_widths(folder)
    hints = typing.get_type_hints(pipeline.__init__)
    for name, (library, class_name) in listed.items():
        if has_weights(class_name) and name in hints and (only is None or name in only):
            config = read_json(folder / name / "config.json")
            wanted = [kind for kind in _options(hints[name]) if isinstance(kind, type)]
            # annotations of other pipelines are not all right
            network = network_class(library, class_name, config)
            if table.PIPELINES and wanted and not issubclass(network, (*wanted,)):
                names = " or ".join(kind.__name__ for kind in wanted if kind is not NoneType)
                raise LoraqError(
                    f"'{folder}/model_index.json' names {class_name} as {name}; a "
                    f"{pipeline.__name__} has {names}. Restore that file, or set model.path to a "
                    "model of this family."
                )
            check_network(folder / name, library, class_name, model.variant)


def _options(hint: Any) -> tuple[Any, ...]:
    """The classes of an annotation: both of `A | B`."""
    return typing.get_args(hint) or (hint,)


def _check_listed(folder: Path, pipeline: Any, listed: Mapping[str, tuple[str, str]]) -> None:
    """LoraqError without a denoiser, or without a component that the pipeline needs."""
    require_denoiser(pipeline)
    for name, parameter in inspect.signature(pipeline.__init__).parameters.items():
        optional = name in pipeline._optional_components or parameter.default is not parameter.empty
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if name != "self" and not (optional or variadic) and name not in listed:
            raise LoraqError(
                f"'{folder}/model_index.json' lists no {name}. {_REMEDY} A {name} that another "
                f"pipeline has can be shared: link its folder (ln -s OTHER/{name} '{folder}/{name}'"
                f") and write its entry of OTHER/model_index.json into this one."
            )


def _check_widths(folder: Path) -> None:
    """LoraqError if a transformer with one text encoder does not fit it, or the VAE beside it."""
    listed = components(folder)
    transformer = read_json(folder / denoiser_names(listed)[0] / "config.json")
    if not isinstance(transformer.get("caption_channels"), int):
        return
    for part, names, reads in (
        ("text_encoder", ("d_model", "hidden_size"), "caption_channels"),
        ("vae", ("latent_channels",), "in_channels"),
    ):
        values = read_json(folder / part / "config.json") if part in listed else {}
        for name in names:
            if name in values and values[name] != transformer.get(reads, values[name]):
                raise LoraqError(
                    f"'{folder}': its {part} gives {name}={values[name]}, its transformer reads "
                    f"{reads}={transformer[reads]}, so they belong to different models. {_REMEDY}"
                )


def check_network(part: Path, library: str, class_name: str, variant: str | None = None) -> None:
    """LoraqError unless the folder of a network holds every tensor of its class.

    library: "transformers", "diffusers", or a pipeline of it with a class of its own.
    """
    read_json(part / "config.json")
    files = tuple(weight_files(part, library, variant))
    if problems := {path.name: problem for path in files if (problem := file_problem(path))}:
        raise LoraqError(f"'{part}' is incomplete: {listed_problems(problems)}. {_REMEDY}")
    config = (part / "config.json").read_text()
    _check_tensors(part, library, class_name, config, files, sizes_and_times(files))


@functools.lru_cache(maxsize=64)
def _check_tensors(
    part: Path,
    library: str,
    class_name: str,
    config: str,
    files: tuple[Path, ...],
    state: tuple[tuple[int, int], ...],
) -> None:
    """`check_network`; a success is cached.

    state: `sizes_and_times` of the files, for the cache.
    """
    values = json.loads(config)
    network = network_class(library, class_name, values)
    if library != "transformers":  # diffusers, or the package of one of its pipelines
        kind = values.get("_class_name", class_name)
        fits = network_class(library, kind, values) is network
    else:
        kind = values.get("model_type")
        fits = kind == network.config_class.model_type
    if not fits:
        raise LoraqError(
            f"'{part}/config.json' is that of a {kind}, not of a {class_name}, which is expected "
            f"there. {_REMEDY}"
        )
    stored: Header = {}
    for path in files:
        stored |= read_header(path)
    if "quantization_config" in values:  # the quantizer that loads it knows its tensors
        return
    if narrow := {name: kind for name, (kind, _) in stored.items() if kind not in _DTYPES}:
        name = next(iter(narrow))
        raise LoraqError(
            f"'{part}': {listed_names(list(narrow))} stored as {narrow[name]}. LoRaQ reads weights "
            "of 16 bits or more, without scales beside them. Use the 16-bit model."
        )
    try:
        found = compare_with_files(network, config, stored)
    except Exception as error:  # whatever the class does with settings that are not its own
        raise LoraqError(
            f"'{part}/config.json' does not describe a {class_name} "
            f"({type(error).__name__}: {str(error).strip()[:200]}). {_REMEDY}"
        ) from error
    for names, problem in (
        (found.missing, "the files lack {} of its architecture (config.json)"),
        (found.reshaped, "the shapes in the files do not fit config.json: {}"),
        (found.extra, "the files hold {} that its architecture (config.json) does not have"),
    ):
        if names:
            text = problem.format(listed_names(names))
            raise LoraqError(f"'{part}' ({class_name}): {text}.\n  {_REMEDY}")


def listed_names(names: Sequence[str]) -> str:
    """'3 tensors (a, b, c)', with the first three names."""
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown})"
