"""Tables of the benchmark records in `results/bench/`, as Markdown.

A record's name starts with its benchmark: `forward_sana_1_6b` is from `experiments.bench.forward`.
Seconds are medians; ratios compare runs that alternate in one process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any

from loraq.errors import unknown
from loraq.metrics.common.intervals import SMALLEST_VERDICT
from loraq.results.tables.text import Cell
from loraq.utils.machine import machine_text

Found = dict[str, Any]


def bench_block(record: Path) -> str:
    """Render a record's table and its provenance, or a placeholder if the file does not exist."""
    bench = next((name for name in TABLES if record.stem.startswith(name)), None)
    if bench is None:
        raise unknown("bench with a table", record.stem, TABLES)
    command = f"`python -m experiments.bench.{bench}`"
    if not record.is_file():
        return f"*Not yet measured: there is no `results/bench/{record.name}`; {command} makes it.*"
    found = json.loads(record.read_text(encoding="utf-8"))
    made = f"`results/bench/{record.name}`, made by {command} at `{found['commit']}`"
    origin = f"{made}; {machine_text(found['machine'])}"
    return "\n".join([*TABLES[bench](found), "", f"{origin}; torch {found['versions']['torch']}."])


Columns = dict[str, Callable[[Any], str]]
"""Column title → function from a row to the text of its cell."""


def yes_no(holds: bool) -> str:
    """A claim as a cell of a table; bold where it does not hold."""
    return "yes" if holds else "**no**"


def columns_table(columns: Columns, rows: Iterable[Any], text: int = 1) -> list[str]:
    """Return the lines of a Markdown table; the first `text` columns are left-aligned."""
    rule = ["---" if place < text else "---:" for place in range(len(columns))]
    cells = ([cell(row) for cell in columns.values()] for row in rows)
    return ["| " + " | ".join(line) + " |" for line in (columns, rule, *cells)]


def _rows_table(columns: Columns, field: str, text: int = 1) -> Callable[[Found], list[str]]:
    """Return a renderer for the rows in `field` of a record: a list, or a mapping by name."""

    def table(found: Found) -> list[str]:
        rows = found[field]
        if isinstance(rows, dict):
            rows = [{"name": name, **row} for name, row in rows.items()]
        return columns_table(columns, rows, text)

    return table


def _forward(found: Found) -> list[str]:
    """Time of a block and of its quantised layers (summed), and stored bytes, for each variant."""
    modules, settings = found["modules"], found["settings"]
    block, *layers = (modules[name] for name in sorted(modules, key=len))
    size, first = settings["bytes"], settings["ways"][0]
    # sums per repeat: all variants of one repeat ran one after the other
    sums = {
        way: [sum(repeat) for repeat in zip(*(one[way]["seconds"] for one in layers), strict=True)]
        for way in settings["ways"]
    }
    columns: Columns = {
        "variant": str,
        "block, ms": lambda way: f"{1000 * block[way]['median_seconds']:.0f}",
        f"relative to {first}": lambda way: f"{block[way]['ratio']:.2f}",
        "quantised layers, ms": lambda way: f"{1000 * median(sums[way]):.0f}",
        f"layers relative to {first}": lambda way: (
            f"{median(a / b for a, b in zip(sums[way], sums[first], strict=True)):.2f}"
        ),
        "stored bytes": lambda way: "–" if size[way] is None else f"{size[way] / size[first]:.3f}",
    }
    return columns_table(columns, settings["ways"])


GENERATION: Columns = {
    "variant": lambda row: row["name"],
    "images per minute": lambda row: f"{row['images_per_minute']:.1f}",
    "time relative to the first": lambda row: f"{row['ratio']:.2f}",
}

QUANTISE: Columns = {
    "method": lambda row: row["name"],
    "bits/weight": lambda row: f"{row['bits_per_weight']:.3f}",
    "seconds": lambda row: f"{row['median_seconds']['library']:.1f}",
    "seconds, layer by layer": lambda row: f"{row['median_seconds']['reference']:.1f}",
    "ratio": lambda row: f"{row['ratio']:.1f}",
    "error": lambda row: f"{row['weight_error']['library']:.5f}",
    "error, layer by layer": lambda row: f"{row['weight_error']['reference']:.5f}",
}

ROUND_TRIP: Columns = {
    "main": lambda row: row["main"],
    "branch bits": lambda row: str(row["branch_bits"]),
    "bits/weight": lambda row: f"{row['bits_per_weight']:.3f}",
    "same bits": lambda row: yes_no(row["identical"]),
    "bytes over budget": lambda row: (
        f"{100 * (row['stored_bytes'] / row['stated_bytes'] - 1):+.2f} %"
    ),
    "load, s": lambda row: f"{row['load_seconds']:.2f}",
    "held, MB": lambda row: f"{row['anonymous_bytes'] / 1e6:.1f}",
}

MODELS: Columns = {
    "model": lambda row: row["hub_id"].partition("/")[2],
    "pipeline": lambda row: f"`{row['pipeline']}`",
    "published parameters": lambda row: f"{row['published_parameters'] / 1e9:.3g} B",
    "built": lambda row: f"{row['parameters'] / 1e9:.2f} B",
    "layers in blocks": lambda row: str(row["quantizable"]),
    "quantised": lambda row: str(row["quantized"]),
    "of all weights": lambda row: f"{100 * row['quantized_weights'] / row['weights']:.1f} %",
}


def _error_of(source: str) -> Callable[[Found], str]:
    """An error by its source; a dash where there is none."""
    kind, name = source.split(".")
    return lambda row: f"{row[kind][name]:.3f}" if name in row[kind] else "–"


KNOWN_INPUTS: Columns = {
    "model": lambda row: f"`{row['class']}`" if not row["trained"] else f"`{row['model']}`",
    "its weights": lambda row: "trained" if row["trained"] else "random",
    "layers behind": lambda row: f"{row['layers']} {row['inputs']}",
    "nearest": _error_of("output_error.nearest"),
    "H of the weights": _error_of("output_error.weights"),
    "measured H": _error_of("output_error.measured"),
    "distance": _error_of("moment_error.weights"),
    "distance, flat": _error_of("moment_error.flat"),
    "distance, text": _error_of("moment_error.text"),
}

EXPORT_RECIPE: Columns = {
    "recipe": lambda row: row["name"],
    "bits/weight": lambda row: f"{row['bits_per_weight']:.3f}",
    "rank": lambda row: str(row["rank"]),
    "weight error": lambda row: f"{row['weight_error']:.4f}",
    "output error": lambda row: f"{row['output_error']:.4f}",
}

METRICS: Columns = {
    "metric": lambda row: row["name"],
    "images/s": lambda row: f"{row['images_per_second']:.1f}",
    "hours for 5000 images": lambda row: f"{row['hours_for_5000']:.1f}",
    "peak, GB": lambda row: f"{row['peak_bytes'] / 1e9:.2f}",
    "peak relative to a quarter of the images": lambda row: f"{row['peak_growth']:.2f}",
}

PARITY: Columns = {
    "metric": lambda row: row["metric"],
    "reference": lambda row: row["reference"],
    "inputs": lambda row: row["inputs"],
    "largest difference": lambda row: (
        f"{row['difference']:.1e}{' (relative)' if row['relative'] else ''}"
    ),
    "bound": lambda row: f"{row['bound']:.0e}",
}

SWEEP: Columns = {
    "launcher": lambda row: row["name"],
    "workers": lambda row: str(row["workers"]),
    "wall, s": lambda row: f"{row['wall_seconds']:.0f}",
    "in jobs, s": lambda row: f"{row['job_seconds']:.0f}",
    "before the first job, s": lambda row: f"{row['before_seconds']:.1f}",
    "after the last job, s": lambda row: f"{row['after_seconds']:.1f}",
    "overhead": lambda row: f"{100 * row['overhead']:.1f} %",
    "same records": lambda row: yes_no(row["same_records"]),
}

FULLSIZE: Columns = {
    "main": lambda row: row["format"],
    "method": lambda row: row["method"],
    "seconds": lambda row: f"{row['wall_seconds']:.0f}",
    "GiB above torch": lambda row: f"{row['peak_above_torch_bytes'] / 2**30:.2f}",
    "error of the estimate at 10 %": lambda row: (
        "–"
        if not row["estimated_seconds"]
        else f"{100 * (row['estimated_seconds'] / row['bar_seconds'] - 1):+.0f} %"
    ),
    "bytes": lambda row: f"{row['file_bytes']:,}",
}

CALIBRATED: Columns = {
    "method": lambda row: row["method"],
    "blocks": lambda row: str(row["blocks"]),
    "GiB above torch": lambda row: f"{row['peak_above_torch_bytes'] / 2**30:.2f}",
    "GiB of activations in files": lambda row: f"{row['activation_bytes'] / 2**30:.2f}",
}


def _kind_seconds(kind: str) -> Callable[[Found], str]:
    return lambda row: f"{row['kinds'][kind]['seconds']:.2f}"


FLOOR: Columns = {
    "method": lambda row: row["name"],
    "seconds": lambda row: f"{row['seconds']:.2f}",
    **{kind: _kind_seconds(kind) for kind in ("products", "decompositions", "rounding", "rest")},
    "GFLOP": lambda row: f"{sum(kind['flops'] for kind in row['kinds'].values()) / 1e9:,.0f}",
    "floor by FLOPs, s": lambda row: f"{row['floor_seconds']['flops']:.2f}",
    "floor by bytes, s": lambda row: f"{row['floor_seconds']['bytes']:.4f}",
    "seconds / floor": lambda row: f"{row['over_floor']:.1f}",
}


def _floor(found: Found) -> list[str]:
    rates, settings = found["rates"], found["settings"]
    note = f"Blocks: {settings['blocks']}, threads: {settings['threads']}; "
    note += f"a large product: {rates['flops'] / 1e9:.0f} GFLOP/s, a large copy: "
    note += f"{rates['bytes'] / 1e9:.0f} GB/s."
    return [*_rows_table(FLOOR, "rows")(found), "", note]


ROOFLINE: Columns = {
    "model": lambda row: row["model"],
    "way": lambda row: row["way"],
    "quantisers": lambda row: row["quantisers"],
    "launches": lambda row: f"{row['launches']:,}",
    "TB": lambda row: f"{row['bytes'] / 1e12:.2f}",
    "TFLOP": lambda row: f"{row['flops'] / 1e12:.0f}",
    "peak, GB": lambda row: f"{row['peak_bytes'] / 1e9:.1f}",
    "passes on an H100, s": lambda row: f"{row['kinds']['passes']:.2f}",
}


def _roofline(found: Found) -> list[str]:
    """Counts and seconds of a step, the assumed rates, and the phases of `table1`."""
    rates = found["settings"]["rates"]

    def seconds(name: str) -> Callable[[Found], str]:
        return lambda row: f"{row['seconds'][name]:.2f}"

    assumed: Columns = {
        "device": lambda row: row["name"],
        "16-bit, TFLOP/s": lambda row: f"{row['flops'] / 1e12:.0f}",
        "TB/s": lambda row: f"{row['bandwidth'] / 1e12:.1f}",
        "µs a launch": lambda row: f"{row['launch'] * 1e6:.0f}",
        "GB": lambda row: f"{row['memory'] / 1e9:.0f}",
    }
    phases: Columns = {
        "model": itemgetter(0),
        "phase": itemgetter(1),
        "minutes": lambda row: f"{row[2]['seconds'] / 60:.1f}",
        "GB on disk": lambda row: f"{row[2]['bytes'] / 1e9:.1f}",
    }
    lines = [
        (model, stage, counts)
        for model, stages in found["table1"].items()
        for stage, counts in stages.items()
    ]
    return [
        *columns_table(
            ROOFLINE | {f"{name}, s": seconds(name) for name in rates}, found["rows"], 3
        ),
        *["", "Assumed of the devices:", "", *columns_table(assumed, rates.values())],
        *["", "`table1` on one H100 by phase:", "", *columns_table(phases, lines, 2)],
    ]


RESUME: Columns = {
    "method": lambda row: row["settings"]["method"],
    "killed after files": lambda row: ", ".join(str(kill["files"]) for kill in row["kills"]),
    "total files": lambda row: str(row["settings"]["files"]),
    "seconds, all attempts": lambda row: (
        f"{row['rest_seconds'] + sum(kill['seconds'] for kill in row['kills']):.0f}"
    ),
    "seconds, uninterrupted": lambda row: f"{row['whole_seconds']:.0f}",
    "finished files kept": lambda row: yes_no(row["kept"]),
    "same bytes": lambda row: yes_no(row["identical"]),
}


def _difference(mean: float, lo: float | None, hi: float | None, **_: float) -> str:
    return Cell(mean, lo, hi, sign=True).text()


AGAIN: Columns = {
    "row": lambda row: row["row"],
    "PSNR": lambda row: f"{row['psnr']['first']:.2f}",
    "PSNR again": lambda row: f"{row['psnr']['last']:.2f}",
    "difference": lambda row: _difference(**row["psnr"]),
    "LPIPS": lambda row: f"{row['lpips']['first']:.4f}",
    "LPIPS again": lambda row: f"{row['lpips']['last']:.4f}",
}


def _again(found: Found) -> list[str]:
    spread, count = found["root_mean_square"], len(found["rows"])
    note = f"Root mean square of the {count} differences: {spread['psnr']:.2f} dB in PSNR, "
    return [*_rows_table(AGAIN, "rows")(found), "", f"{note}{spread['lpips']:.4f} in LPIPS."]


def _errors(found: Found) -> list[str]:
    """Coverage and families with a claim, in %, before → now; of a kind, its worst metric."""
    kinds: dict[str, dict[int, list[Any]]] = {}
    for row in found["simulations"]:
        kind = row["differences"].split()[-1]
        kinds.setdefault(kind, {}).setdefault(row["n"], []).append(row)

    def coverage(rows: list[Any]) -> str:
        lowest = (min(row[part] for row in rows) for part in ("coverage_before", "coverage"))
        return " → ".join(f"{100 * share:.0f}" for share in lowest)

    def claims(rows: list[Any], family: str) -> str:
        now = f"{100 * max(row['claims'][family] for row in rows):.0f}"
        before = "–"
        if family in rows[0]["claims_before"]:
            before = f"{100 * max(row['claims_before'][family] for row in rows):.0f}"
        return f"{before} → {now if rows[0]['n'] >= SMALLEST_VERDICT else f'– ({now})'}"

    lines = []
    for kind, by_size in kinds.items():
        lines.append([f"{kind}: coverage", *map(coverage, by_size.values())])
        for family in found["settings"]["families"]:
            cells = [claims(rows, family) for rows in by_size.values()]
            lines.append([f"{kind}: claims in families of {family}", *cells])
    titles = ["differences", *(f"N = {n}" for n in next(iter(kinds.values())))]
    columns: Columns = {title: itemgetter(place) for place, title in enumerate(titles)}
    kid = ", ".join(f"{100 * row['coverage']:.0f} % at N = {row['n']}" for row in found["kid"])
    return [*columns_table(columns, lines), "", f"Coverage of KID's interval: {kid}."]


def _kernel_counts(found: Found) -> list[str]:
    """Of the kernel with both products: a step's instructions, and modelled times as ranges."""

    def linear(row: Found) -> Found:
        kernels: list[Found] = row["kernels"]
        return next(kernel for kernel in kernels if kernel["name"] == "linear")

    def span(ratios: Iterable[float]) -> str:
        values = sorted(ratios)
        return f"{values[0]:.2f}–{values[-1]:.2f}" if values else "–"

    def over_peak(row: Found, field: str = "linear_over_bf16") -> str:
        return span(time[field] for time in row.get("times", {}).values())

    def over_compiled(row: Found) -> str:
        base = row["base"]["times"]
        return span(
            time["milliseconds"]["linear"] / base[shape]["milliseconds"]["linear"]
            for shape, time in row["times"].items()
        )

    columns: Columns = {
        "GPU": lambda row: row["gpu"],
        "recipe": lambda row: row["recipe"],
        "tensor instructions a step": lambda row: ", ".join(
            f"{count} × `{name}`" for name, count in linear(row)["loops"][0]["tensor"].items()
        ),
        "all instructions": lambda row: str(linear(row)["loops"][0]["instructions"]),
        "registers": lambda row: str(linear(row)["registers"]),
        "spills, all kernels": lambda row: str(sum(one["spills"] for one in row["kernels"])),
        "before": lambda row: over_peak(row["before"]),
        "over bf16's peak": over_peak,
        "over bf16, compiled alike": over_compiled,
        "with quantising": lambda row: over_peak(row, "layer_over_bf16"),
    }
    rows = [
        row
        | {
            "gpu": f"{found['gpus'][target]['name']} ({target})",
            "recipe": recipe,
            "base": recipes["bf16"],
            "before": found["before"].get(target, {}).get(recipe, {}),
        }
        for target, recipes in found["now"].items()
        for recipe, row in recipes.items()
    ]
    return columns_table(columns, rows, 3)


def _engines(found: Found) -> list[str]:
    """A layout's median difference for each recipe, or a number for why it refuses; losses."""
    reasons: dict[str, str] = {}

    def refusal(one: Found) -> str:
        first = one["refused"].split("\n")[1:2] or [one["refused"]]
        text = first[0].partition("': ")[2] or first[0].strip()
        return reasons.setdefault(text, f"({len(reasons) + 1})")

    def cell(place: int) -> Callable[[str], str]:
        def text(target: str) -> str:
            one = found["rows"][place]["targets"][target]
            return refusal(one) if "refused" in one else f"{100 * one['median']:.2f} %"

        return text

    columns: Columns = {"layout": lambda target: f"`{target}`"}
    columns |= {row["name"]: cell(place) for place, row in enumerate(found["rows"])}
    names = list(found["settings"]["targets"])
    lines = [*columns_table(columns, names), ""]
    lines += [
        "Median over layers of ‖y′ − y‖ / ‖y‖ on random inputs. Refused are:",
        "",
    ]
    lines += [f"- {number} {text}" for text, number in reasons.items()]
    lines += ["", "What is lost, of the first recipe that a layout holds:", ""]
    for target in names:
        for row in found["rows"]:
            if losses := row["targets"][target].get("losses"):
                lines.append(f"- `{target}`, {row['name']}: {' '.join(losses)}")
                break
    return lines


def _other_libraries(found: Found) -> list[str]:
    """Memory and metrics of pipelines of other libraries and of ours, by bits of the denoiser."""

    def interval(name: str, digits: int) -> Callable[[Any], str]:
        def cell(row: Any) -> str:
            found = row[name]
            return Cell(found["value"], found["lo"], found["hi"], digits).text()

        return cell

    def difference(row: Any) -> str:
        if "paired" not in row["psnr"]:
            return "–"
        mean, lo, hi = row["psnr"]["paired"]
        return Cell(mean, lo, hi, mark=row["psnr"]["claim"], sign=True).text()

    columns: Columns = {
        "method": lambda row: row["label"],
        "activations": lambda row: row["activations"],
        "bits/weight": lambda row: f"{row['bits_per_weight']:.3f}",
        "of the denoiser": lambda row: f"{row['denoiser_bits_per_weight']:.3f}",
        "PSNR ↑": interval("psnr", 2),
        "LPIPS ↓": interval("lpips", 4),
        f"Δ PSNR to {found['baseline']}": difference,
    }
    versions = ", ".join(f"{name} {version}" for name, version in found["libraries"].items())
    return [*columns_table(columns, found["rows"], text=2), "", f"Other libraries: {versions}."]


def _adapters(found: Found) -> list[str]:
    """PSNR between packed and 16 bits, without and with LoRA, and what a packed layer leaves."""
    settings = found["settings"]
    columns: Columns = {
        "images": itemgetter("images"),
        "compared with": itemgetter("reference"),
        "PSNR, dB": lambda row: f"{row['psnr']:.1f}",
    }
    return [
        *columns_table(columns, found["rows"], text=2),
        "",
        f"{settings['prompts']} prompts; {settings['method']}, {settings['bits_per_weight']:.3f} "
        f"bits/weight, and an adapter of rank {settings['rank']}, "
        f"{settings['adapter_bytes'] / 1e6:.2f} MB in float32. Images after it was removed equal "
        f"those before to the bit: {yes_no(settings['equal_after_removing'])}.",
    ]


TABLES: dict[str, Callable[[Found], list[str]]] = {
    "adapters": _adapters,
    "again": _again,
    "calibrated": _rows_table(CALIBRATED, "rows"),
    "engines": _engines,
    "errors": _errors,
    "floor": _floor,
    "forward": _forward,
    "fullsize": _rows_table(FULLSIZE, "rows", text=2),
    "generation": _rows_table(GENERATION, "ways"),
    "kernel_counts": _kernel_counts,
    "export_recipe": _rows_table(EXPORT_RECIPE, "rows"),
    "known_inputs": _rows_table(KNOWN_INPUTS, "rows", text=3),
    "metrics": _rows_table(METRICS, "metrics"),
    "models": _rows_table(MODELS, "rows", text=2),
    "other_libraries": _other_libraries,
    "parity": _rows_table(PARITY, "rows", text=3),
    "quantise": _rows_table(QUANTISE, "methods"),
    "roofline": _roofline,
    "resume": lambda found: columns_table(RESUME, [found]),
    "round_trip": _rows_table(ROUND_TRIP, "rows"),
    "sweep": _rows_table(SWEEP, "launchers"),
}
