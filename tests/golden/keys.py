"""What every row's products are called: the golden file of keys, and how it is made.

    python -m tests.golden.keys      write keys.json anew, after a change that means to move keys

The file holds every row of every experiment on both embedded models. Settings and recipes are kept
as differences to the first quantised row's, so that a changed key can be traced to its setting.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

# before versions are pinned: these look at torch's when they are imported
import transformers  # noqa: F401
from diffusers import PixArtSigmaPipeline, SanaPipeline  # noqa: F401

from loraq.compose import load_rows
from loraq.config.overrides import config_groups
from loraq.metrics import clip_score, image_reward
from loraq.metrics.common.features import INCEPTION_VARIABLE
from loraq.quantization.fingerprint import fingerprint_text
from loraq.quantization.grouping import UnitAllocation
from loraq.runner.product_keys import make_row
from loraq.utils.hashing import key
from loraq.utils.plain import to_plain

FILE = Path(__file__).with_name("keys.json")
MODELS = ("tiny_pixart", "tiny_sana")
OWN_PROMPTS = (
    *("data=captions", "data.captions=asset:captions.json", "data.count=8"),
    "metrics=default",
)
LATER = (
    *((f"model.{name}", None) for name in ("variant", "revision", "domain", "fps")),
    ("model.dtypes", {}),
    ("data.domain", "emoji"),
    ("data.domain", None),
    ("quant.branch.budget_rank", None),
    ("quant.sixteen_bit", "format"),
    ("quant.transform.signs", "random"),
)
"""Settings added since the file was written, with the default that leaves the keys as they are."""
PACKAGES = (
    *("torch", "diffusers", "transformers", "torchvision", "torchmetrics"),
    *("lpips", "clean-fid", "pillow", "numpy"),
)
WEIGHTS = (clip_score.VARIABLE, image_reward.VARIABLE, INCEPTION_VARIABLE)
SHARES = (UnitAllocation(0), UnitAllocation(3), UnitAllocation(12, 8))


@contextmanager
def pinned_machine() -> Iterator[None]:
    """Two threads of a CPU whose products do not depend on the batch; packages of no version.

    No weights of metrics but the packaged ones.
    """
    version = importlib.metadata.version

    @functools.cache
    def pinned(package: str) -> str:
        return "pinned" if package in PACKAGES else version(package)

    with (
        mock.patch("importlib.metadata.version", pinned),
        mock.patch("loraq.metrics.common.result.package_version", pinned),
        mock.patch.dict(os.environ, dict.fromkeys(WEIGHTS, "")),
        mock.patch("loraq.utils.batch_invariance.row_invariant", lambda _threads=None: True),
        mock.patch("loraq.utils.batch_invariance.use_onednn", lambda _device: False),
        mock.patch("loraq.utils.batch_invariance.use_bfloat16", lambda _device, _dtype: False),
        mock.patch("torch.get_num_threads", lambda: 2),
    ):
        yield


def overrides_of(experiment: str, model: str) -> list[str]:
    """Experiments on published prompts get embedded ones here: those files are not at hand."""
    published = OWN_PROMPTS if experiment.startswith("protocol") else ()
    if experiment == "protocol":
        published += ("calibration.set=captions", "calibration.prompts=32")
    return [f"experiment={experiment}", f"model={model}", "device=cpu", *published]


def found_keys() -> dict[str, Any]:
    """The contents of the golden file as the code makes them now."""
    defaults: dict[str, Any] = {}
    experiments: dict[str, Any] = {}
    with pinned_machine():
        for experiment in config_groups()["experiment"]:
            for model in MODELS:
                rows = load_rows(overrides_of(experiment, model))
                experiments[f"{experiment} {model}"] = {
                    str(config.row): _row(config, defaults) for config in rows
                }
        return {"defaults": defaults, "experiments": experiments, "plain": plain_keys()}


def plain_keys() -> dict[str, str]:
    """Keys of plain data, as the stages pass it."""
    return {
        "numbers": key(1, 2.5, None, True, "é"),
        "containers": key({"b": [1, (2,)], "a": {"c": None}}),
    }


def _row(config: Any, defaults: dict[str, Any]) -> dict[str, Any]:
    plain = {n: v for n, v in _leaves(to_plain(config)).items() if (n, v) not in LATER}
    found = {"config": _difference("config", plain, defaults), "keys": make_row(config).keys}
    if config.quant is not None:
        found["recipe"] = _difference("recipe", _leaves(config.quant.identity()), defaults)
        texts = [fingerprint_text(config.quant, share) for share in SHARES]
        defaults.setdefault("fingerprint", texts[-1])
        found["fingerprint"] = key(texts)
    return found


def _difference(what: str, leaves: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """What the first quantised row has otherwise, or has and this row has not («absent»)."""
    if leaves.get("quant", ...) is None:  # the 16-bit row: of its settings all but the recipe's
        return leaves
    base = defaults.setdefault(what, leaves)
    changed = {name: v for name, v in leaves.items() if name not in base or base[name] != v}
    return changed | {name: "«absent»" for name in base if name not in leaves}


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        found |= _leaves(value, path + ".") if isinstance(value, dict) and value else {path: value}
    return found


def text(found: dict[str, Any]) -> str:
    """One line a row, so that a change shows which rows it touches."""
    lines = ["{"]
    for name in ("defaults", "plain"):
        lines.append(f' "{name}": {json.dumps(found[name], ensure_ascii=False, sort_keys=True)},')
    lines.append(' "experiments": {')
    for place, (experiment, rows) in enumerate(found["experiments"].items()):
        lines.append(f'  "{experiment}": {{')
        shown = [
            f'   "{row}": {json.dumps(entry, ensure_ascii=False, sort_keys=True)}'
            for row, entry in rows.items()
        ]
        lines.append(",\n".join(shown))
        lines.append("  }" + ("," if place + 1 < len(found["experiments"]) else ""))
    return "\n".join([*lines, " }", "}", ""])


if __name__ == "__main__":
    FILE.write_text(text(found_keys()), encoding="utf-8")
    print(f"{FILE}: {FILE.stat().st_size / 1e3:.0f} kB")
