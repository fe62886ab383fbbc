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
from loraq.help_texts import COMMANDS, EPILOGS, PLANNED
from loraq.utils import batch_invariance
from loraq.utils.console import reporting_errors


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
    from loraq.runner.estimate import describe
    from loraq.runner.plan import check, make_plan
    from loraq.runner.store import Store

    configs = load_rows(overrides)
    store = Store(configs[0].output)
    rows = make_plan(configs, store)
    check(rows)
    print(describe(rows, store))


def part(command: str, overrides: Sequence[str], progress: bool) -> None:
    """The stages up to packed layers (`quantize`) or images (`generate`), without metrics."""
    from loraq.compose import load_rows
    from loraq.runner.calibrate import calibrate
    from loraq.runner.plan import check, make_plan
    from loraq.runner.product_keys import ACTIVATIONS
    from loraq.runner.session import Session
    from loraq.runner.stages import generate, quantise
    from loraq.runner.store import Store

    configs = load_rows(overrides)
    store = Store(configs[0].output)
    rows = make_plan(configs, store, last="quantised" if command == "quantize" else "images")
    check(rows)
    session = Session(store, progress)
    for row in rows:
        with session.using(row):
            for stage in ACTIVATIONS:
                if stage in row.todo:
                    calibrate(session, row, stage)
            if "quantised" in row.todo:
                model = quantise(session, row)
                ranks = "–".join(map(str, dict.fromkeys((model.ranks[0], model.ranks[-1]))))
                print(f"{row.name}: {model.bits_per_weight:.3f} bits/weight, rank {ranks}")
            if "images" in row.todo:
                generate(session, row)
        stage = "quantised" if command == "quantize" else "images"
        if stage in row.keys:
            print(f"{row.name}: {store.path(stage, row.keys[stage])}")


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
    from loraq.results.experiment_folder import rewrite

    print(rewrite(output, experiments))


def report(options: argparse.Namespace) -> None:
    """One page of an experiment that was run, or is committed."""
    from loraq.results.report import write_report
    from loraq.results.report.source import located

    folder = located(Path(options.output) / "results" / options.experiment)
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
