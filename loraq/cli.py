"""The command `loraq` and its parts: run, sweep, quantize, generate, evaluate, score, export, …

Functions import what they need, so that `--help` does not import torch or diffusers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loraq import __version__
from loraq.config.hydra_options import check_cfg_option, refuse_options
from loraq.errors import LoraqError, unknown
from loraq.utils import batch_invariance
from loraq.utils.failures import reporting_errors
from loraq.utils.files import check_writable, write_text

if TYPE_CHECKING:
    from loraq.runner.rows import Stage

OVERRIDES = """\
overrides are KEY=VALUE in Hydra's syntax:
  experiment=demo | table1              a list of rows, compared in a table (conf/experiment/)
  method=rtn | lqer | svdquant | loraq_o1 | loraq_o2 | loraq_best | loraq_export | reference …
  model=tiny_pixart | tiny_sana | pixart_sigma | sana_1_6b[_ch5632] …
  model=hub model.hub_id=OWNER/NAME     any diffusion transformer of diffusers, or model.path=FOLDER
  transform=none | shift | hadamard64   replaces the method's rotation and shift
  format@quant.weight=mxfp4_e2m1        also .activation, .branch_weight, .branch_activation
  quant.branch.rank=16                  or quant.branch.budget=0.64 (bits per weight)
  data.count=16  generate.batch_size=4  metrics=paired  tracking=disabled  output=FOLDER
  data=file data.captions=FILE.txt      your own prompts, one per line
      calibration.captions=asset:captions.json   and the prompts of calibrated methods
  quant.branch.kind=FILE.py             your own branch finder (README, "Your own method")
All settings and their defaults: conf/config.yaml and its groups.

examples:
  loraq run experiment=demo
  loraq run experiment=table1 --dry-run
  loraq run experiment=table1 row=rtn --cfg job
  loraq run method=loraq_o2 format@quant.branch_weight=int4 data.count=16
  loraq quantize method=svdquant transform=hadamard64
"""

COMMANDS = {
    "run": "run an experiment: quantise, generate, measure, write tables (resumes, uses the cache)",
    "sweep": "run an experiment's rows, or each A,B in overrides, as jobs here, on Slurm or Ray",
    "quantize": "quantise the rows and store the packed layers",
    "generate": "generate the images (quantises first if necessary)",
    "evaluate": "same as run",
    "fit": "find the largest batch size that fits into memory, from trials with 1 and 2 images",
    "save": "save a row's pipeline as a packed folder with a model card (quantises if necessary)",
    "score": "measure a saved pipeline (generates its images) or any folder of images",
    "export": "write a packed checkpoint in the layout of another program, and measure the loss",
    "inspect": "list a model's layers, what a method makes of them, and why others stay in 16 bits",
    "fetch": "download a published set of prompts and images, or the metrics' weights (resumes)",
    "report": "write an HTML page of an experiment: tables, diagrams, images, configurations",
    "tables": "print and rewrite the tables of finished experiments from their records",
    "cache": "list, verify or remove the products in the output folder",
}

PLANNED = ("run", "quantize", "generate", "evaluate")

SAVE = """\
examples:
  loraq save packed method=loraq_best
  loraq save packed experiment=best row=loraq_best     with the scores, if it was run
Load the folder with diffusers after `import loraq.diffusers_quantizer` (docs/checkpoints.md).
"""
SCORE = """\
examples:
  loraq score packed_pipeline data.count=32
  loraq score packed_pipeline model=hub        a pipeline of any other class
  loraq score outputs/images/0123456789abcdef --against outputs/images/fedcba9876543210
  loraq score my_images data.captions=captions.json data.split=test data.real=null metrics=paired \\
      --against my_reference --json scores.json
  loraq score sdnq_pipeline --beside results/demo --record sdnq.json
  loraq score qwen-Q4_K.gguf model=hub model.path=FOLDER
TARGET: a folder of images, a pipeline that diffusers saved, whatever quantised it (also OWNER/NAME
on the hub), or a transformer as GGUF with its pipeline in model.*. Images are named NAME.png after
their captions; without captions they are matched by file name. model.* sets how a pipeline samples.
"""
EXPORT = """\
examples:
  loraq export --list                                      layouts, and what reads them
  loraq export packed/transformer engine --to comfy-kitchen --dry-run
  loraq export packed engine --to comfy-kitchen --prompt "a red cat" --prompt "a blue dog"
CHECKPOINT is the folder of a packed pipeline, all of which is written, or that of its transformer.
Layers that the layout cannot express are refused before anything is written, with the remedy;
what is lost is listed. The files are read back, and outputs of all layers compared with the packed
ones: on random inputs, or on those of images made from each --prompt, which are compared too.
docs/engines.md has every layout.
"""
INSPECT = """\
examples:
  loraq inspect model=tiny_sana
  loraq inspect model=tiny_pixart method=svdquant --layers --json layers.json
  loraq inspect model=tiny_sana --yaml layers.yaml     to edit; model.family=layers.yaml reads it
Reads configurations alone: model=hub model.hub_id=ORG/NAME, or model.path=FOLDER with JSON files.
FLOPs are those of one forward at the model's size.
"""
SWEEP = """\
examples:
  loraq sweep experiment=table1                                    one job per row, here
  loraq sweep experiment=table1 hydra/launcher=slurm hydra.launcher.partition=gpu
  loraq sweep method=svdquant,loraq_o2 quant.branch.budget=0.32,0.64 hydra/launcher=ray
  loraq sweep --status outputs/sweeps/ID      how the jobs ended
  loraq sweep --again outputs/sweeps/ID       run the unfinished jobs again
A product that several jobs need is made once. python -m loraq.run --multirun is the same.
"""
FETCH = """\
examples:
  loraq fetch mjhq FOLDER
  loraq fetch weights                          FID's, CLIPScore's and ImageReward's (3.6 GB)
  loraq fetch weights --only fid,image_reward  96 MB and 1.8 GB; clip_score: 1.7 GB
  loraq run model=pixart_sigma data=mjhq data.captions=FOLDER
Weights are stored in $HF_HOME/loraq (default: ~/.cache/huggingface/loraq), where runs find them.
You can copy either folder from another machine. If interrupted, run the same command again to
resume; if complete, it verifies the sha256 of every file.
"""
EPILOGS = dict.fromkeys((*PLANNED, "fit"), OVERRIDES) | {
    "save": SAVE,
    "score": SCORE,
    "export": EXPORT,
    "inspect": INSPECT,
    "fetch": FETCH,
    "sweep": SWEEP,
}


def parse_arguments(given: Sequence[str]) -> argparse.Namespace:
    """The options of one command line; overrides may stand on both sides of an option.

    In Python 3.11 argparse allows this only in `parse_intermixed_args`, which a parser of several
    commands does not have, so the command's own parser is called.
    """
    top, commands = make_parsers()
    if not given or given[0] not in commands:
        return top.parse_args(given)
    chosen = argparse.Namespace(command=given[0])
    return commands[given[0]].parse_intermixed_args(given[1:], chosen)


def make_parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of `loraq`, and those of its commands by name."""
    parsers: dict[str, argparse.ArgumentParser] = {}
    top = argparse.ArgumentParser(
        prog="loraq",
        description="LoRaQ: quantised low-rank compensation for 4-bit diffusion transformers.",
        epilog="`loraq COMMAND --help` lists the options of a command. To start: loraq run "
        "experiment=demo",
    )
    top.add_argument("--version", action="version", version=f"loraq {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = parsers[name] = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=EPILOGS.get(name),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add = command.add_argument
        if name in ("tables", "cache", "report"):
            add("--output", type=Path, default="outputs", help="output folder (default: outputs)")
        else:
            if name == "fetch":
                add("set", metavar="SET", help="mjhq, sdci, qdiff, parti or drawbench; or weights")
                add("folder", type=Path, nargs="?", metavar="FOLDER", help="target folder of a set")
                add("--only", metavar="METRIC,…", help="with weights: those of these metrics")
            elif name == "save":
                add("folder", type=Path, metavar="FOLDER", help="new folder for the pipeline")
            elif name == "score":
                add("target", type=Path, metavar="TARGET", help="images, a pipeline, a FILE.gguf")
            elif name == "export":
                add("checkpoint", type=Path, nargs="?", help="packed pipeline or transformer")
                add("folder", type=Path, nargs="?", metavar="OUT", help="a new folder")
                add("--to", metavar="LAYOUT", help="its name (--list)")
                add("--list", action="store_true", help="list the layouts and stop")
                add("--dry-run", action="store_true", help="check, list the losses and stop")
                add("--dtype", help="float16 or bfloat16 (default: the model's, else float16)")
                add("--prompt", action="append", default=[], help="compare an image; repeatable")
                add("--call", action="append", default=[], metavar="KEY=VALUE", help="its argument")
                add("--json", type=Path, metavar="FILE", help="also write all values to a file")
            if name not in ("fetch", "export"):
                add("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="see below")
            if name not in ("sweep", "inspect"):
                add("--quiet", action="store_true", help="no progress bars")
        if name in PLANNED:
            add("--dry-run", action="store_true", help="print the plan and stop")
            add("--cfg", "-c", metavar="job", help="print the configuration of every row and stop")
            add("--resolve", action="store_true", help="with --cfg job: resolve all values")
        if name == "sweep":
            add("--status", type=Path, metavar="FOLDER", help="print how a sweep's jobs ended")
            add("--yes", action="store_true", help="run a sweep of more than 1,000 jobs")
            add("--again", type=Path, metavar="FOLDER", help="run its unfinished jobs again")
        if name == "score":
            add("--against", type=Path, metavar="FOLDER", help="reference images, same names")
            add("--json", type=Path, metavar="FILE", help="also write all values to a file")
            add(
                "--record", type=Path, metavar="FILE", help="also write a record, as of `loraq run`"
            )
            add("--name", metavar="NAME", help="of the row (default: the target's)")
            help_of_beside = "a record or results/NAME: one table, paired differences; repeatable"
            add("--beside", type=Path, action="append", default=[], help=help_of_beside)
        if name == "inspect":
            add("--layers", action="store_true", help="every layer, not one line per role")
            add("--yaml", type=Path, metavar="FILE", help="write roles and skipped layers, to edit")
            add("--json", type=Path, metavar="FILE", help="also write all values to a file")
        if name == "report":
            add("experiment", help="name in OUTPUT/results/ or in results/")
            add("--rows", help="rows whose images are shown, e.g. rtn,svdquant")
            add("--to", type=Path, metavar="FILE.html", help="default: next to the tables")
        if name == "tables":
            add("experiments", nargs="*", help="names (default: all)")
        if name == "cache":
            states = ("partial", "corrupted")
            add("--verify", action="store_true", help="check the sha256 of every file")
            add("--remove", choices=states, help="delete these, except those in use by a run")
            add("--yes", action="store_true", help="with --remove: do not ask")
    return top, parsers


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command `loraq` with `arguments` (default: those of the process)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    with reporting_errors():
        if given and given[0] in (*PLANNED, "fit", "save", "sweep"):
            refuse_options(given[1:])
        options = parse_arguments(given)
    batch_invariance.configure_cpu_math()  # before anything imports torch
    with reporting_errors():
        if options.command in PLANNED:
            check_cfg_option(options.cfg, options.resolve, options.dry_run)
        if options.command == "tables":
            from loraq.results.experiment_folder import rewrite_tables

            print(rewrite_tables(options.output, options.experiments))
        elif options.command == "report":
            write_page(options)
        elif options.command == "cache":
            print(cache(options))
        elif options.command == "save":
            from loraq.runner.save import save_row

            print(save_row(options.overrides, options.folder, progress=not options.quiet))
        elif options.command == "score":
            score(options)
        elif options.command == "export":
            export_checkpoint(options)
        elif options.command == "inspect":
            inspect_layers(options)
        elif options.command == "sweep":
            sweep(options)
        elif options.command == "fetch":
            fetch(options)
        elif options.command == "fit":
            from loraq.runner.batch_size import fit_batch_size

            print(fit_batch_size(options.overrides, progress=not options.quiet).text())
        elif options.cfg is not None:
            print_configuration(options.overrides, options.resolve)
        elif options.dry_run:
            from loraq.runner.estimate import dry_run

            print(dry_run(options.overrides, last_stage(options.command)))
        elif options.command in ("run", "evaluate"):
            from loraq.runner.experiment import run

            print(run(options.overrides, progress=not options.quiet).text)
        else:
            from loraq.runner.experiment import run_until

            last = last_stage(options.command)
            run_until(last, options.overrides, not options.quiet, print)


def last_stage(command: str) -> Stage:
    """The stage that a command runs to."""
    from loraq.runner.rows import Stage

    return {"quantize": Stage.QUANTIZED, "generate": Stage.IMAGES}.get(command, Stage.RECORD)


def print_configuration(overrides: Sequence[str], resolve: bool) -> None:
    """Print all rows as YAML, as composed.

    resolve: also resolve interpolations and the model family's default list of skipped layers.
    """
    from omegaconf import OmegaConf

    from loraq.compose import compose_rows, load_rows
    from loraq.utils.plain import to_plain

    if resolve:
        shown = {row.row: to_plain(row) for row in load_rows(overrides)}
    else:
        shown = {row.config.row: row.written for row in compose_rows(overrides)}
    print(OmegaConf.to_yaml(OmegaConf.create(shown)).rstrip())


def score(options: argparse.Namespace) -> None:
    """Print the metrics of a saved pipeline or of a folder of images, beside other rows."""
    from loraq.results import record
    from loraq.runner.beside import beside_text
    from loraq.runner.score import score_images

    beside = {path.resolve() for path in options.beside}
    for path in filter(None, (options.json, options.record)):
        check_writable(path)
        if path.resolve() in beside:
            raise LoraqError(f"'{path}' is a row of --beside. Give a new file for this one.")
    scores = score_images(
        options.target,
        options.overrides,
        options.against,
        not options.quiet,
        options.beside,
        options.name,
    )
    print(scores.text())
    if options.json is not None:
        record.save_findings(scores.plain(), options.json)
    if options.record is not None:
        record.save_record(scores.record, options.record)
    if options.beside:
        print(f"\n{beside_text(scores.record, options.beside)}")


def export_checkpoint(options: argparse.Namespace) -> None:
    """Write a packed checkpoint in another layout, or list the layouts."""
    from loraq.layouts.targets import list_targets

    if options.list:
        print(list_targets())
        return
    if options.to is None or options.checkpoint is None or options.folder is None:
        raise LoraqError(
            "export needs a checkpoint, a new folder and a layout: loraq export CHECKPOINT OUT "
            "--to comfy-kitchen. `loraq export --list` names the layouts."
        )
    import yaml

    from loraq.layouts.export import export
    from loraq.results import record

    pairs = [given.partition("=") for given in options.call]
    if options.json is not None:
        check_writable(options.json)
    found = export(
        options.checkpoint,
        options.folder,
        options.to,
        dtype=options.dtype,
        prompts=options.prompt,
        call={name: yaml.safe_load(value) for name, _, value in pairs},
        dry_run=options.dry_run,
        progress=not options.quiet,
    )
    print(found.text())
    if options.json is not None:
        record.save_findings(found.plain(), options.json)


def inspect_layers(options: argparse.Namespace) -> None:
    """Print the layers of a model, and write them to files that are asked for."""
    from loraq.results import record
    from loraq.runner.inspection import inspect_model

    for path in filter(None, (options.json, options.yaml)):
        check_writable(path)
    found = inspect_model(options.overrides)
    print(found.text(options.layers))
    if options.json is not None:
        record.save_findings(found.plain(), options.json)
    if options.yaml is not None:
        write_text(options.yaml, found.yaml())
        print(f"To run with it, as edited: model.family={options.yaml}")


def fetch(options: argparse.Namespace) -> None:
    """Download a set of prompts into a folder, or weights of metrics into their cache."""
    if options.set == "weights":
        from loraq.metrics.common.fetch import fetch_weights
        from loraq.metrics.common.published import PUBLISHED, choose_weights

        if options.folder is not None:
            raise LoraqError(
                f"fetch weights: {options.folder} has no effect, weights go to $HF_HOME/loraq. "
                "Leave FOLDER out, or set HF_HOME=FOLDER for this command and for runs."
            )
        only = options.only and choose_weights(options.only.split(","))
        fetch_weights(only or PUBLISHED, print, progress=not options.quiet)
        return
    from loraq.data.fetch import describe_prompt_set, fetch_prompt_set
    from loraq.data.sets import SETS

    if options.set not in SETS:
        raise unknown("set to fetch", options.set, [*SETS, "weights"])
    if options.folder is None or options.only:
        raise LoraqError(
            f"fetch {options.set} needs a target folder, and --only is for weights: "
            f"loraq fetch {options.set} FOLDER"
        )
    folder = options.folder.expanduser()
    found = fetch_prompt_set(options.set, folder, progress=not options.quiet)
    print(describe_prompt_set(found, folder))


def cache(options: argparse.Namespace) -> str:
    """List the products of an output folder, or remove some of them after a question."""
    from loraq.runner.cache import list_products, remove_products

    def confirmed(listed: str) -> bool:
        print(listed)
        return options.yes or (
            sys.stdin.isatty() and input("Remove these? [y/N] ").strip().lower() in ("y", "yes")
        )

    if options.remove is not None:
        return remove_products(options.output, options.remove, options.verify, confirmed)
    if options.yes:
        raise LoraqError("--yes answers the question of --remove. Add --remove STATE.")
    return list_products(options.output, options.verify)


def sweep(options: argparse.Namespace) -> None:
    """Run a new sweep or the unfinished jobs of an earlier one, or print how its jobs ended."""
    from loraq.runner.sweep import launch_sweep, rerun_unfinished, sweep_summary

    if options.status is not None:
        print(sweep_summary(options.status))
    elif options.again is not None:
        print(rerun_unfinished(options.again, options.overrides))
    else:
        print(launch_sweep(options.overrides, options.yes))


def write_page(options: argparse.Namespace) -> None:
    """Write the HTML page of an experiment that was run here or is committed."""
    from loraq.results.report import write_report
    from loraq.results.report.source import locate_experiment

    folder = locate_experiment(options.output / "results" / options.experiment)
    target = options.to or folder / "report.html"
    check_writable(target)
    rows = None if options.rows is None else options.rows.split(",")
    size = write_report(folder, target, rows).stat().st_size
    if not (folder / "rows.json").is_file():
        print(f"'{folder.name}' was not run here: the page shows the committed records.")
    print(f"{target} ({size / 1e6:.1f} MB): open it in a browser; the file is self-contained.")


if __name__ == "__main__":
    main()
