"""What `loraq score` found: metrics, memory and time, as text, as JSON, and as a row of tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraq.config import Config
from loraq.metrics.common.image_set import ImageSet
from loraq.results import record as records
from loraq.results.record import Record
from loraq.results.tables.columns import ARROWS, unit_of
from loraq.runner.evaluate import portable_config
from loraq.utils.hashing import key

if TYPE_CHECKING:
    from loraq.models.held import Held

IMAGES = "images"
"""The entry of a record's `timings` with the seconds of all images."""


@dataclass(frozen=True)
class Made:
    """How a pipeline made its images: memory of its denoiser, seconds of all images.

    method: what quantised it, as `quant_method` says; None if nothing does. model_hash: of the
        files of a saved one, whose text was encoded before; the seconds of others contain that.
    """

    held: Held
    seconds: float
    method: str | None = None
    model_hash: str = ""


@dataclass(frozen=True)
class Scores:
    """Metrics of the images in a folder; `made`: how a pipeline made them, if one did.

    record: the same as a row of tables, in the layout of the records of `loraq run`.
    """

    images: Path
    record: Record
    made: Made | None = None

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """Name → value, interval and values of single images (`Record.metrics`)."""
        return self.record.metrics

    @property
    def held(self) -> Held | None:
        """Memory of the pipeline's denoiser."""
        return None if self.made is None else self.made.held

    @property
    def seconds_per_image(self) -> float | None:
        """Of the pipeline's calls; None for images of another program."""
        return None if self.made is None else self.made.seconds / len(self.record.images["names"])

    def plain(self) -> dict[str, Any]:
        """The values for a JSON file."""
        about = dict(self.record.images)
        names, blank = about["names"], about.pop("one_colour", [])
        other = {name: about[name] for name in about.keys() - {"hash", "names", "seen"}}
        held = self.held
        packed = None
        if held is not None and held.quantized_weights:
            packed = {
                "bits_per_weight": held.quantized_bits_per_weight,
                "nbytes": held.quantized_nbytes,
            }
        return {
            "metrics": self.metrics,
            "names": names,
            "packed": packed,
            "held": None if held is None else held.plain(),
            "seconds_per_image": self.seconds_per_image,
            "one_colour": blank,
            **other,
        }

    def text(self) -> str:
        """Time, settings and memory, then one line per metric with its confidence interval."""
        unit = unit_of(self.record)
        lines = [f"{len(self.record.images['names'])} {unit} in {self.images}"]
        if self.made is not None:
            text = "" if self.made.model_hash else " with its text encoder"
            lines[0] += f", {self.seconds_per_image:.3g} s each{text}"
            lines += [_sampled(self.record.config["model"]), *_memory(self.made.held)]
        for name, entry in self.metrics.items():
            reason = str(entry["reason"]).replace("images", unit)
            line = f"  {name} {ARROWS[entry['direction']]}  "
            if entry["value"] is None:
                lines.append(f"{line}–  ({reason})")
                continue
            interval = entry["lo"] is not None
            found = f"[{entry['lo']:.5g}, {entry['hi']:.5g}]" if interval else f"({reason})"
            lines.append(f"{line}{entry['value']:.5g}  {found}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        unit, measured = unit_of(self.record), ", ".join(self.metrics)
        return f"Scores({len(self.record.images['names'])} {unit} in '{self.images}': {measured})"


def _sampled(model: Mapping[str, Any]) -> str:
    """How the pipeline was run, in settings: they are those of `model=`, not of its folder."""
    known = {name: model[name] for name in ("height", "width", "steps", "guidance")}
    shown = ", ".join(f"{name}={value}" for name, value in known.items() if value is not None)
    return f"  model={model['name']}: {shown}"


def _memory(held: Held) -> list[str]:
    bits = held.quantized_bits_per_weight
    layers = "nothing is quantised"
    if bits is not None:
        share = held.quantized_weights / held.weights
        layers = f"{bits:.3f} bits/weight in the quantised layers ({share:.1%} of the weights)"
    kinds = ", ".join(f"{kind} {size / 1e6:.2f} MB" for kind, size in held.kinds.items())
    whole = f"{held.bits_per_weight:.3f} bits/weight in the denoiser"
    return [f"  {layers}, {whole}", f"  held: {kinds}"]


def scored_record(
    config: Config,
    row: str,
    images: ImageSet,
    found: Mapping[str, Any],
    made: Made | None,
    device: str,
) -> Record:
    """The record of measured images. row: its name in tables, and its label."""
    about = {"hash": images.hash, "names": list(images.names), "seen": list(images.seen or ())}
    blank = images.one_colour(config.metrics.workers)
    held = None if made is None else made.held
    plain = portable_config(config) | {"quant": None, "row": row, "label": row}
    quantized = held is None or held.quantized_weights > 0  # a library may leave no name
    plain["method"] = (made and made.method) or ("scored" if quantized else "reference")
    if made is None:  # images of another program say nothing of a model
        plain["model"] = {"name": row}
    if not any(images.prompts or ()):  # matched by file name
        plain["data"] |= {"captions": None, "count": None}
    return Record(
        key=key("scored", images.hash, row, dict(found)),
        experiment="score",
        row=row,
        label=row,
        config=plain,
        model_hash="" if made is None else made.model_hash,
        budget={
            "bits_per_weight": None if held is None else held.quantized_bits_per_weight,
            "nbytes": held.quantized_nbytes
            if held is not None and held.quantized_weights
            else None,
            "rank": None,
            "held": None if held is None else held.plain(),
        },
        images=about | images.about() | ({"one_colour": blank} if blank else {}),
        metrics=dict(found),
        timings={} if made is None else {IMAGES: made.seconds},
        **records.provenance(device),
    )
