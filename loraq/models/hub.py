"""A model on the hub: its snapshot in the local cache, and what is fetched if files are missing.

Small files are fetched first. What they describe must exist here (classes, tokenizer, scheduler),
and the repository must hold the weights that the pipeline reads; only these are then downloaded.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraq.config import ModelConfig
from loraq.errors import LoraqError, near_matches
from loraq.models.call import check_model_call, check_text
from loraq.models.files import (
    SMALL,
    WEIGHTS,
    absent_weights,
    components,
    file_problem,
    file_problems,
    has_weights,
    is_small,
    used_files,
    weight_files,
)
from loraq.models.networks import pipeline_class
from loraq.models.parts import check_parts
from loraq.utils.assets import offline
from loraq.utils.download import check_space
from loraq.utils.texts import first_line

log = logging.getLogger(__name__)
_SMALL_PATTERNS = [f"*{ending}" for ending in SMALL]


@dataclass(frozen=True)
class Fetch:
    """Weights of a hub model that are not in the cache: path → bytes (None: not stated).

    folder: the snapshot that they complete, named by its commit.
    """

    hub_id: str
    folder: Path
    files: Mapping[str, int | None]

    @property
    def size(self) -> int:
        """Bytes of all files, as far as they are stated."""
        return sum(size or 0 for size in self.files.values())

    @property
    def commit(self) -> str:
        """The commit of the repository."""
        return self.folder.name

    def __str__(self) -> str:
        lines = [
            f"{self.hub_id} at {self.commit[:12]}: {len(self.files)} files to fetch, "
            f"{self.size / 1e9:.2f} GB, into {self.folder}"
        ]
        width = max(map(len, self.files))
        sizes = {n: "?" if s is None else f"{s / 1e6:.1f} MB" for n, s in self.files.items()}
        return "\n".join([*lines, *(f"  {name:{width}}  {sizes[name]:>10}" for name in self.files)])


def in_cache(model: ModelConfig) -> bool:
    """Whether all files of a hub model are here, so that nothing is downloaded."""
    folder, problems = _cached(model)
    return folder is not None and not problems


def hub_folder(model: ModelConfig) -> Path:
    """The snapshot of a hub model with all files that are read; missing ones are downloaded.

    DiskFullError without room for them.
    """
    folder, problems = _cached(model)
    if folder is not None and not problems:
        return folder
    if (fetch := planned_fetch(model)) is not None:
        from huggingface_hub import snapshot_download

        log.info("%s", fetch)
        begun = sum(_begun(fetch.folder))  # by other processes of this run, perhaps
        check_space(fetch.folder, fetch.size - begun, f"model.hub_id={model.hub_id}")
        with _reporting(model, fetch.folder, problems):
            _snapshot(snapshot_download, model, fetch.commit, [*fetch.files])
    folder, problems = _cached(model)
    if folder is None or problems:
        raise LoraqError(
            f"model.hub_id={model.hub_id}: '{folder}' lacks files of the pipeline after the "
            f"download: {listed_problems(problems)}\n  Delete damaged files and run again. Files "
            "that the repository does not have cannot be read: use a local copy, model.path=FOLDER "
            "model.hub_id=null, saved with safe_serialization=True."
        )
    return folder


def config_folder(model: ModelConfig) -> Path:
    """The snapshot of a hub model with at least its configurations, which are fetched if missing.

    LoraqError for every fault of the network.
    """
    folder, problems = _cached(model)
    if folder is not None and not any(is_small(name) for name in problems):
        return folder
    _require_network(model, folder, problems)
    from huggingface_hub import snapshot_download

    log.info("%s: reading its configurations and vocabularies from the hub …", model.hub_id)
    with _reporting(model, folder, problems):
        commit = model.revision if folder is None else folder.name
        return _snapshot(snapshot_download, model, commit, _SMALL_PATTERNS)


def _require_network(model: ModelConfig, folder: Path | None, problems: Mapping[str, str]) -> None:
    """LoraqError with the remedy if the environment forbids what has to be fetched."""
    if offline():
        raise LoraqError(
            f"model.hub_id={model.hub_id}: {_state(folder, problems)}, and the environment is set "
            f"to offline (HF_HUB_OFFLINE).\n{_remedy(model, folder, problems)}"
        )


def planned_fetch(model: ModelConfig) -> Fetch | None:
    """The weights that `hub_folder` would download; None if all files are in the cache.

    Downloads the small files. LoraqError if they name something that does not exist here, if the
    repository lacks weights, and for every fault of the network.
    """
    folder, problems = _cached(model)
    if folder is not None and not problems:
        return None
    _require_network(model, folder, problems)
    from huggingface_hub import HfApi, snapshot_download

    commit = None if folder is None else folder.name  # of the snapshot to complete
    with _reporting(model, folder, problems):
        about = HfApi().model_info(
            model.hub_id, revision=commit or model.revision, files_metadata=True, timeout=10
        )
        sizes = {entry.rfilename: entry.size for entry in about.siblings or ()}
        folder = _snapshot(snapshot_download, model, commit or model.revision, _SMALL_PATTERNS)
    pipeline = pipeline_class(folder)
    check_model_call(pipeline, model)
    check_text(pipeline, model)
    check_parts(folder)
    wanted = _weights(folder, model, sizes)
    return Fetch(str(model.hub_id), folder, {n: sizes[n] for n in wanted}) if wanted else None


def _snapshot(download: Any, model: ModelConfig, revision: str | None, names: list[str]) -> Path:
    """Download files into the snapshot of `revision`, which becomes the cached one."""
    return Path(download(model.hub_id, revision=revision, allow_patterns=names, etag_timeout=10))


def _cached(model: ModelConfig) -> tuple[Path | None, dict[str, str]]:
    """The snapshot of the revision in the local cache, and what is wrong with its files."""
    from huggingface_hub import snapshot_download

    try:  # an incomplete snapshot is found as well
        found = snapshot_download(
            model.hub_id,
            revision=model.revision,
            local_files_only=True,
            allow_patterns="model_index.json",
        )
    except Exception:
        return None, {}
    return Path(found), file_problems(Path(found), model.variant)


def _weights(folder: Path, model: ModelConfig, listed: Mapping[str, Any]) -> list[str]:
    """The weight files that are read and not in the snapshot, chosen among the `listed` ones."""
    parts = components(folder)
    used_files(listed, parts, model.variant)  # that the repository has the variant
    wanted = []
    for name, (library, class_name) in parts.items():
        names = [path.removeprefix(f"{name}/") for path in listed if path.startswith(f"{name}/")]
        for path in weight_files(folder / name, library, model.variant, names):
            if not has_weights(class_name) or file_problem(path) is None:
                continue
            if path.name not in names:
                raise LoraqError(
                    f"model.hub_id={model.hub_id} at {folder.name[:12]}: '{name}/{path.name}' "
                    f"{absent_weights(path.name, names)}."
                )
            wanted.append(f"{name}/{path.name}")
    return wanted


@contextlib.contextmanager
def _reporting(
    model: ModelConfig, folder: Path | None, problems: Mapping[str, str]
) -> Iterator[None]:
    """LoraqError with the remedy for whatever the hub's client raises inside the block."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except RevisionNotFoundError:
        raise LoraqError(_unknown_revision(model)) from None
    except RepositoryNotFoundError:
        raise LoraqError(
            f"model.hub_id={model.hub_id}: the hub has no such repository, or it is private or "
            "gated. Set model.hub_id to OWNER/NAME as on its page; or get access there, and log "
            "in: hf auth login (or HF_TOKEN=TOKEN)."
        ) from None
    except Exception as error:
        reason = first_line(error)
        raise LoraqError(
            f"model.hub_id={model.hub_id}: {_state(folder, problems)}, and the download failed "
            f"({reason[:160]}). Run the same command again: finished files are kept.\n"
            f"{_remedy(model, folder, problems)}"
        ) from None


def _unknown_revision(model: ModelConfig) -> str:
    from huggingface_hub import HfApi

    try:
        refs = HfApi().list_repo_refs(str(model.hub_id))
        names = [ref.name for ref in (*refs.branches, *refs.tags)]
    except Exception:  # the list only helps
        names = []
    close = near_matches(str(model.revision), names) or names
    known = f" It has {', '.join(close[:5])}." if close else ""
    return (
        f"model.revision={model.revision}: {model.hub_id} has no such commit, branch or tag."
        f"{known} Set model.revision to one that it has, or to null for its main branch."
    )


def _state(folder: Path | None, problems: Mapping[str, str]) -> str:
    if folder is None:
        return "not in the local hub cache"
    state = f"its snapshot '{folder}' is incomplete: {listed_problems(problems)}"
    if begun := _begun(folder):
        plural = "s" if len(begun) > 1 else ""
        state += (
            f"; {len(begun)} interrupted download{plural} ({sum(begun) / 1e6:.1f} MB in blobs/)"
        )
    return state


def _begun(snapshot: Path) -> list[int]:
    """Bytes of each download of a repository that was begun, or is under way."""
    found = []
    for path in (snapshot.parents[1] / "blobs").glob("*.incomplete"):
        with contextlib.suppress(FileNotFoundError):  # finished meanwhile
            found.append(path.stat().st_size)
    return found


def _remedy(model: ModelConfig, folder: Path | None, problems: Mapping[str, str]) -> str:
    """How to get the missing files: the command of the hub's client that names them."""
    command = f"hf download {model.hub_id}"
    if folder is None:
        command += f" --revision {model.revision}" if model.revision else ""
        weights = f"*.{model.variant}*{WEIGHTS}" if model.variant else f"*{WEIGHTS}"
        patterns = [f"*{ending}" for ending in SMALL] + [weights]
        command += "".join(f" --include '{pattern}'" for pattern in patterns)
    else:
        command += "".join(f" {name}" for name in problems) + f" --revision {folder.name}"
    return (
        "  Use a local copy: model.path=FOLDER model.hub_id=null; or download it to the hub cache "
        f"on a machine with network access and copy the cache:\n  {command}"
    )


def listed_problems(problems: Mapping[str, str]) -> str:
    """'unet/config.json is missing; vae/… is empty (5 more)'."""
    shown = "; ".join(f"{name} {problem}" for name, problem in list(problems.items())[:3])
    return shown + (f" ({len(problems) - 3} more)" if len(problems) > 3 else "")


def planned_fetches(models: Sequence[ModelConfig]) -> list[Fetch]:
    """What runs of these models would download first; each model once."""
    unique = {repr(model): model for model in models if model.hub_id is not None}
    return [fetch for model in unique.values() if (fetch := planned_fetch(model)) is not None]
