"""Model families: what a file in `loraq/models/families/` says of its transformers.

A family says only what cannot be derived; `generic` is the family without a file.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from loraq.config import Recipe
from loraq.errors import unknown
from loraq.models import families
from loraq.models.family_file import is_family_file, read_family
from loraq.utils.kinds import Kind

if TYPE_CHECKING:
    import torch

    from loraq.models.moments import Moment

GENERIC = "generic"


@dataclass(frozen=True)
class Family:
    """What is known of a family; the defaults are those of `generic`.

    PIPELINES, TRANSFORMERS: the diffusers classes it is for.
    OUTPUT: what the pipelines make (None: read from the class, which imports diffusers).
    ROLES: (pattern of a layer's name inside its block, role), before the usual names.
    DEFAULT_SKIP: roles or globs (None: by rule, see `discovery/structure.py`).
    SIZE_MULTIPLE: pixels of which height and width are multiples.
    TEXT_DEFAULTS: arguments with one default in the pipeline's call, another in `encode_prompt`.
    EMBEDDINGS: names of the tensors that `encode_prompt` returns, if they are cached by name.
    DTYPES: component → dtype, where it is not that of the denoiser (None: by rule, `dtypes.py`).
    known_inputs: transformer → moments of layer inputs by input id (`models/moments.py`).
    example_inputs: transformer, images, side, tokens → arguments of its forward.
    """

    name: str = GENERIC
    PIPELINES: tuple[str, ...] = ()
    OUTPUT: Kind | None = None
    TRANSFORMERS: tuple[str, ...] = ()
    ROLES: tuple[tuple[str, str], ...] = ()
    DEFAULT_SKIP: tuple[str, ...] | None = None
    SIZE_MULTIPLE: int = 1
    TEXT_DEFAULTS: tuple[str, ...] = ()
    EMBEDDINGS: tuple[str, ...] = ()
    DTYPES: Mapping[str, str] | None = field(default=None, hash=False)
    known_inputs: Callable[..., Mapping[str, Moment]] | None = None
    example_inputs: Callable[..., Mapping[str, Any]] | None = None


def family_names() -> list[str]:
    """The names of the model families: the modules of `loraq/models/families/`, and `generic`."""
    modules = (module.name for module in pkgutil.iter_modules(families.__path__))
    return sorted([*modules, GENERIC])


def find_family(name: str) -> Family:
    """A model family by name, or by its file; LoraqError with near matches for an unknown name."""
    if is_family_file(name):
        file = read_family(name)
        base = find_family(file.family)
        return replace(base, name=name, ROLES=file.roles, DEFAULT_SKIP=file.skip)
    if name == GENERIC:
        return Family()
    if name not in family_names():
        raise unknown("model family", name, family_names())
    module = importlib.import_module(f"{families.__name__}.{name}")
    held = {known.name for known in fields(Family)} & vars(module).keys()
    return Family(name, **{known: getattr(module, known) for known in held})


def family_for(class_name: str) -> str:
    """The family of a pipeline or transformer by the name of its class; `generic` if none."""
    for name in family_names():
        family = find_family(name)
        if class_name in (*family.PIPELINES, *family.TRANSFORMERS):
            return name
    return GENERIC


def recipe_for(recipe: Recipe, family_name: str, dtype: str | torch.dtype) -> Recipe:
    """The recipe with what it leaves to the model: the skipped layers, the type in 16 bits.

    `skip` stays None for a family whose list follows from the transformer.
    """
    recipe = recipe.for_model(str(dtype).removeprefix("torch."))
    if recipe.skip is not None:
        return recipe
    return replace(recipe, skip=find_family(family_name).DEFAULT_SKIP)
