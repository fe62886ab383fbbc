"""The classes of a pipeline's networks, and the networks without weights. No remote code."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraq.errors import LoraqError, did_you_mean, near_matches
from loraq.models.files import STEMS, Header, read_json

_UNUSED = re.compile(r"\.y_embedding$")
"""Tensors in PixArt's files that only its training reads."""


def quiet_diffusers() -> Any:
    """Import diffusers without messages about optional packages and without progress bars."""
    import logging

    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    return diffusers


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Disable log messages and progress bars of transformers inside the block."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def pipeline_class(folder: Path) -> Any:
    """The class of the pipeline in a folder; LoraqError for one that diffusers does not have."""
    diffusers = quiet_diffusers()
    name = read_json(folder / "model_index.json").get("_class_name")
    if not isinstance(name, str):
        raise LoraqError(
            f"'{folder}/model_index.json' names no class of diffusers ({name!r}). A pipeline with "
            "code of its own (custom_pipeline, trust_remote_code) is not loaded: use a model of a "
            f"class of diffusers {diffusers.__version__}."
        )
    found = getattr(diffusers, name, None)
    if isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline):
        return found
    close = near_matches(name, [known for known in dir(diffusers) if known.endswith("Pipeline")])
    raise LoraqError(
        f"'{folder}' is a {name}, which diffusers {diffusers.__version__} does not have."
        f"{did_you_mean(close)}\n  Code of a model's own is not run. Install a version of "
        "diffusers that has this class (pip install -U diffusers), or use another model."
    )


def network_class(library: str, name: str, config: Mapping[str, Any]) -> Any:
    """The class of a component in `model_index.json`; LoraqError if the library has none.

    config: the contents of its `config.json`, by which diffusers replaces classes of earlier
        versions, such as Transformer2DModel.
    """
    quiet_diffusers()
    from diffusers.models.model_loading_utils import _fetch_remapped_cls_from_config
    from diffusers.models.modeling_utils import LegacyModelMixin

    found = None
    if library in STEMS:
        found = getattr(importlib.import_module(library), name, None)
    elif (module := getattr(quiet_diffusers().pipelines, library, None)) is not None:
        found = getattr(module, name, None)  # a network of one pipeline, such as Stable Audio's
    if found is None:
        known = dir(importlib.import_module(library)) if library in STEMS else []
        raise LoraqError(
            f"model_index.json names the class {name} of {library}, which is not installed."
            f"{did_you_mean(near_matches(name, known))} Classes of diffusers and transformers are "
            "loaded, no remote code: install the version that the model needs, or set model.path "
            "to another model."
        )
    if issubclass(found, LegacyModelMixin) and "norm_type" in config:
        return _fetch_remapped_cls_from_config(config, found)
    return found


def without_weights(network: Any, config: Mapping[str, Any], buffers: bool = False) -> Any:
    """A network of diffusers with its parameters on the meta device, and plain 16-bit layers.

    network: its class. config: the contents of its `config.json`; what it says of packed layers is
        left out. buffers: allocate the buffers, such as position tables, which no file contains.
    """
    from accelerate import init_empty_weights
    from diffusers.models.modeling_utils import no_init_weights

    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    with no_init_weights(), init_empty_weights(include_buffers=not buffers):
        return network.from_config(plain)


@dataclass(frozen=True)
class Difference:
    """Names of tensors that files lack, have in addition, or have in another shape."""

    missing: Sequence[str]
    extra: Sequence[str]
    reshaped: Sequence[str]


def compare_with_files(network: Any, config: str, stored: Header) -> Difference:
    """Compare the tensors of a network's class with stored names and shapes, on the meta device.

    network: a class of diffusers or transformers. config: the contents of its `config.json`.
    Renamed and tied tensors are treated as the library does when it loads them.
    """
    import torch

    with torch.device("meta"):
        tensors = {name: torch.empty(shape) for name, (_, shape) in stored.items()}
    values = json.loads(config)
    if network.__module__.startswith("transformers."):
        with quiet_transformers():  # whose report goes into an error, if there is one
            _, found = network.from_pretrained(
                None,
                config=network.config_class.from_dict(values),
                state_dict=tensors,
                device_map="meta",
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        reshaped = [key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]]
        # heads that the class does not have are left out on purpose
        return Difference(sorted(found["missing_keys"]), [], sorted(reshaped))
    empty = without_weights(network, values)
    empty._fix_state_dict_keys_on_load(tensors)
    expected = {name: tensor.shape for name, tensor in empty.state_dict().items()}
    computed = dict(empty.named_buffers()).keys() - expected.keys()  # such as position tables
    tensors = {n: t for n, t in tensors.items() if n not in computed and not _UNUSED.search(n)}
    both = expected.keys() & tensors.keys()
    return Difference(
        sorted(expected.keys() - both),
        sorted(tensors.keys() - both),
        sorted(name for name in both if expected[name] != tensors[name].shape),
    )
