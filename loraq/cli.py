"""The command `loraq` and its parts: run, sweep, quantize, generate, evaluate, score, report, …

Nothing heavy is imported before a command knows that it needs it: `--help` is quick.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from loraq import __version__
from loraq.config.hydra_options import check_cfg_option, refuse_options
from loraq.utils import batch_invariance
from loraq.utils.console import reporting_errors

OVERRIDES = """\
overrides are KEY=VALUE in Hydra's syntax:
  experiment=demo | table1              a list of rows with a table (conf/experiment/)
  method=rtn | lqer | loftq | svdquant | loraq_o1 | loraq_o2 | loraq_best | reference …
  model=tiny_pixart | tiny_sana | pixart_sigma | sana_1_6b   or model.path=FOLDER, your own
  transform=none | shift | hadamard64   instead of the method's own rotation and shift
  format@quant.weight=mxfp4_e2m1        also .activation, .branch_weight, .branch_activation
  quant.branch.rank=16                  or quant.branch.budget=0.64 (bits per weight)
  data.count=16  generate.batch_size=4  metrics=paired  tracking=disabled  output=FOLDER
  data=file data.captions=FILE.txt      prompts of your own, one a line
      calibration.captions=asset:captions.json   and what calibrated methods read beside them
  quant.branch.kind=FILE.py             your own way to find L and R (README, "Your own method")
All settings with their defaults: conf/config.yaml and its groups.

examples:
  loraq run experiment=demo
  loraq run experiment=table1 --dry-run
  loraq run experiment=table1 row=rtn --cfg job
  loraq run method=loraq_o2 format@quant.branch_weight=int4 data.count=16
  loraq quantize method=svdquant transform=hadamard64
"""

COMMANDS = {
    "run": "the whole experiment: quantise, generate, measure, table (resumes; cached parts stay)",
    "sweep": "many runs: here, on Slurm or on Ray; an experiment's rows, or every A,B of overrides",
    "quantize": "only quantise the rows, keep the packed layers",
    "generate": "only make the images (quantises what is missing)",
    "evaluate": "only measure: like run, and the same records",
    "fit": "try the last row with one and two images, and say which batch fits into memory",
    "score": "measure a saved pipeline (it makes its images) or any folder of images",
    "fetch": "download a published set of prompts and images into a folder (resumes)",
    "report": "write one HTML page of an experiment: tables, diagrams, images, configurations",
    "tables": "print and rewrite the tables of the records that are there",
    "cache": "list what lies under the output folder, verify or remove it",
}

PLANNED = ("run", "quantize", "generate", "evaluate")

SCORE = """\
examples:
  loraq score packed_pipeline data.count=32
  loraq score outputs/images/0123456789abcdef --against outputs/images/fedcba9876543210
  loraq score my_images data.captions=captions.json data.split=test data.real=null metrics=paired \\
      --against my_reference --json scores.json
An image is called NAME.png after its caption's name. With a pipeline, model.* says how it samples.
"""
SWEEP = """\
examples:
  loraq sweep experiment=table1                                    one job a row, here
  loraq sweep experiment=table1 hydra/launcher=slurm hydra.launcher.partition=gpu
  loraq sweep method=rtn,loraq_o2 quant.branch.budget=0.32,0.64 hydra/launcher=ray
  loraq sweep --status outputs/sweeps/ID      how the jobs ended
  loraq sweep --again outputs/sweeps/ID       only those that failed or were lost
Jobs share products: what several want is made once. python -m loraq.run --multirun is the same.
"""
FETCH = """\
A folder that another machine filled serves as well. Then:
  loraq run model=pixart_sigma data=mjhq data.captions=FOLDER
Interrupted, the same command goes on where it stopped; run again, it checks every file's sha256.
"""
EPILOGS = dict.fromkeys((*PLANNED, "fit"), OVERRIDES) | {
    "score": SCORE,
    "fetch": FETCH,
    "sweep": SWEEP,
}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="loraq",
        description="LoRaQ: quantised low-rank compensation for 4-bit diffusion transformers.",
        epilog="`loraq COMMAND --help` lists a command's options. First look: loraq run "
        "experiment=demo",
    )
    top.add_argument("--version", action="version", version=f"loraq {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=EPILOGS.get(name),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name in ("tables", "cache", "report"):
            command.add_argument("--output", default="outputs", help="folder (default: outputs)")
        else:
            if name == "fetch":
                command.add_argument("set", metavar="SET", help="mjhq, sdci, parti or drawbench")
                command.add_argument("folder", metavar="FOLDER", help="where to put it")
            elif name == "score":
                command.add_argument("target", metavar="FOLDER", help="images, or a saved pipeline")
            if name != "fetch":
                command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="see below")
            if name != "sweep":
                command.add_argument("--quiet", action="store_true", help="no progress bars")
        if name in PLANNED:
            command.add_argument("--dry-run", action="store_true", help="print the plan and stop")
            command.add_argument(
                "--cfg", "-c", metavar="job", help="print every row's configuration and stop"
            )
            command.add_argument(
                "--resolve", action="store_true", help="with --cfg job: all values as they run"
            )
        if name == "sweep":
            command.add_argument("--status", metavar="FOLDER", help="how a sweep's jobs ended")
            command.add_argument("--again", metavar="FOLDER", help="its unfinished jobs only")
        if name == "score":
            command.add_argument(
                "--against", metavar="FOLDER", help="images of the same captions, pair by pair"
            )
            command.add_argument("--json", metavar="FILE", help="write all values there as well")
        if name == "report":
            command.add_argument("experiment", help="its name: of OUTPUT/results/, or of results/")
            command.add_argument("--rows", help="rows whose images are shown, such as rtn,svdquant")
            command.add_argument("--to", metavar="FILE.html", help="default: beside its tables")
        if name == "tables":
            command.add_argument("experiments", nargs="*", help="names (default: all there are)")
        if name == "cache":
            command.add_argument("--verify", action="store_true", help="check every file's sha256")
            command.add_argument(
                "--remove",
                choices=("partial", "corrupted"),
                help="delete unfinished or set-aside products (finished ones are never deleted)",
            )
    return top


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    with reporting_errors():
        if given and given[0] in (*PLANNED, "fit", "sweep"):
            refuse_options(given[1:])
    options = parser().parse_args(given)
    batch_invariance.configure_cpu_math()  # before anything imports torch
    with reporting_errors():
        if options.command in PLANNED:
            check_cfg_option(options.cfg, options.resolve, options.dry_run)
        if options.command == "tables":
            tables(Path(options.output), options.experiments)
        elif options.command == "report":
            report(options)
        elif options.command == "cache":
            cache(Path(options.output), options.verify, options.remove)
        elif options.command == "score":
            score(options)
        elif options.command == "sweep":
            sweep(options)
        elif options.command == "fetch":
            from loraq.data.fetch import describe_prompt_set, fetch_prompt_set

            folder = Path(options.folder).expanduser()
            print(
                describe_prompt_set(
                    fetch_prompt_set(options.set, folder, progress=not options.quiet), folder
                )
            )
        elif options.command == "fit":
            from loraq.runner.batch_size import fit

            print(fit(options.overrides, progress=not options.quiet).text())
        elif options.cfg is not None:
            print_configuration(options.overrides, options.resolve)
        elif options.dry_run:
            dry_run(options.overrides)
        elif options.command in ("run", "evaluate"):
            from loraq.runner.experiment import run

            print(run(options.overrides, progress=not options.quiet).text)
        else:
            part(options.command, options.overrides, progress=not options.quiet)


def print_configuration(overrides: Sequence[str], resolve: bool) -> None:
    """YAML of every row under its name, as composed; with `resolve` as it runs.

    As it runs: interpolations and the model family's own list of skipped layers are filled in.
    """
    from omegaconf import OmegaConf

    from loraq.compose import compose_rows, load_rows
    from loraq.utils.plain import to_plain

    if resolve:
        shown = {row.row: to_plain(row) for row in load_rows(overrides)}
    else:
        shown = {row.config.row: row.written for row in compose_rows(overrides)}
    print(OmegaConf.to_yaml(OmegaConf.create(shown)).rstrip())


def dry_run(overrides: Sequence[str]) -> None:
    """What is cached, what would be made, how long and how large; nothing is made."""
    from loraq.compose import load_rows
    from loraq.runner.estimate import describe_plan
    from loraq.runner.plan import check_rows, make_plan
    from loraq.runner.store import Store

    configs = load_rows(overrides)
    store = Store(configs[0].output)
    rows = make_plan(configs, store)
    check_rows(rows)
    print(describe_plan(rows, store))


def part(command: str, overrides: Sequence[str], progress: bool) -> None:
    """The stages up to packed layers (`quantize`) or images (`generate`), without metrics."""
    from loraq.runner.experiment import run_until
    from loraq.runner.rows import Stage

    last = Stage.QUANTIZED if command == "quantize" else Stage.IMAGES
    run_until(last, overrides, progress, print)


def score(options: argparse.Namespace) -> None:
    """Metrics of a saved pipeline or of a folder of images."""
    from loraq.results import record
    from loraq.runner import score as scoring

    against = None if options.against is None else Path(options.against)
    found = scoring.score(
        Path(options.target), options.overrides, against, progress=not options.quiet
    )
    if options.json is not None:
        record.save_findings(found.plain(), Path(options.json))
    print(found.text())


def sweep(options: argparse.Namespace) -> None:
    """Jobs of a new sweep, or of an old one; or only how they ended."""
    from loraq.runner.sweep import again, launch, status

    if options.status is not None:
        print(status(Path(options.status)))
    elif options.again is not None:
        print(again(Path(options.again), options.overrides))
    else:
        print(launch(options.overrides))


def tables(output: Path, experiments: Sequence[str]) -> None:
    """Tables again from records; reads neither images nor models."""
    from loraq.results.experiment_folder import rewrite_tables

    print(rewrite_tables(output, experiments))


def report(options: argparse.Namespace) -> None:
    """One page of an experiment that was run, or is committed."""
    from loraq.results.report import write_report
    from loraq.results.report.source import locate_experiment

    folder = locate_experiment(Path(options.output) / "results" / options.experiment)
    target = folder / "report.html" if options.to is None else Path(options.to)
    rows = None if options.rows is None else options.rows.split(",")
    size = write_report(folder, target, rows).stat().st_size
    if not (folder / "rows.json").is_file():
        print(f"'{folder.name}' was not run here: these are the committed records.")
    print(f"{target} ({size / 1e6:.1f} MB): open it in a browser, it needs nothing else.")


def cache(output: Path, verify: bool, remove: str | None) -> None:
    """List the products by stage; with `verify` set damaged ones aside; `remove` what is no use."""
    from loraq.runner.store import Store

    store, total = Store(output), 0
    for stage, name, state, size in list(store.products()):
        if verify and state == "finished" and not store.finished(stage, name):
            state = "corrupted"
        if remove == state:
            shutil.rmtree(store.path(stage, f"{name}.{state}"))
            state = "removed"
        total += size if state != "removed" else 0
        print(f"{stage:10} {name}  {state:9} {size / 1e6:10.2f} MB")
    print(f"{total / 1e6:.2f} MB in {output}/")


if __name__ == "__main__":
    main()
