"""Execute the notebooks, time them, and check that they are committed without outputs.

    python -m notebooks.execute                 all notebooks: make test-notebooks
    python -m notebooks.execute 1_first_tour    some notebooks, by name
    python -m notebooks.execute --strip         remove outputs before a commit

Executed copies are written to outputs/notebooks/. A notebook runs in an empty folder and with the
hub libraries offline, so that it cannot depend on the folder in which Jupyter was started.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from loraq.errors import LoraqError, unknown
from loraq.utils.files import write_bytes

FOLDER = Path(__file__).resolve().parent
EXECUTED = FOLDER.parent / "outputs" / "notebooks"
LIMIT = 300.0  # seconds; on two idle cores each takes less than 120
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def notebooks(names: Sequence[str] = ()) -> list[Path]:
    """Return the paths of the notebooks with these names, or of all; LoraqError if unknown."""
    there = {path.stem: path for path in sorted(FOLDER.glob("*.ipynb"))}
    wanted = [Path(name).stem for name in names] or list(there)
    for name in wanted:
        if name not in there:
            raise unknown("notebook", name, there)
    return [there[name] for name in wanted]


def stripped(text: str) -> str:
    """Return a notebook's text without outputs, execution counts and the user's metadata."""
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        cell["metadata"] = {}
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    notebook["metadata"] = METADATA
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def is_stripped(path: Path) -> bool:
    text = path.read_text(encoding="utf-8")
    return text == stripped(text)


def execute(path: Path, limit: float) -> float:
    """Run one notebook, save its executed copy, return the seconds; LoraqError if it fails."""
    try:
        import nbformat
        from nbclient import NotebookClient
        from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
    except ImportError as error:
        raise LoraqError(
            f"{error}. Install the extra: pip install -c constraints.txt -e '.[notebooks]', or "
            "run `make test-notebooks`, which installs it."
        ) from None
    notebook = nbformat.read(path, as_version=4)
    started = time.perf_counter()

    def left(_cell: Any) -> float:
        return max(1.0, limit - (time.perf_counter() - started))

    cells = sum(cell.cell_type == "code" for cell in notebook.cells)
    with (
        tqdm(total=cells, desc=path.stem, unit="cell") as bar,
        tempfile.TemporaryDirectory() as empty,
        tempfile.TemporaryDirectory() as sockets,
    ):
        client = NotebookClient(
            notebook,
            timeout_func=left,
            resources={"metadata": {"path": empty}},
            on_cell_executed=lambda **_: bar.update(),
        )
        client.km = client.create_kernel_manager()
        client.km.transport = "ipc"  # sockets in a temporary folder, no ports
        client.km.connection_file = str(Path(sockets) / "kernel.json")
        try:
            client.execute(env=_environment())
        except CellTimeoutError:
            raise LoraqError(_too_long(path, limit, time.perf_counter() - started)) from None
        except (CellExecutionError, DeadKernelError) as error:
            raise LoraqError(f"{path.name} fails:\n{error}") from None
        finally:
            text = nbformat.writes(notebook)
            EXECUTED.mkdir(parents=True, exist_ok=True)
            write_bytes(EXECUTED / path.name, text.encode("utf-8"))
    seconds = time.perf_counter() - started
    if seconds > limit:
        raise LoraqError(_too_long(path, limit, seconds))
    return seconds


def _environment() -> dict[str, str]:
    """Return the kernel's environment: this checkout's library, hub libraries offline."""
    paths = [str(FOLDER.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}


def _too_long(path: Path, limit: float, seconds: float) -> str:
    return (
        f"{path.name} took {seconds:.0f} s, the limit is {limit:.0f} s. Shorten it or, on a "
        "slow or busy machine, set a higher --limit."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    from loraq.utils.failures import reporting_errors

    parser = argparse.ArgumentParser(
        prog="python -m notebooks.execute", description="Execute the notebooks and time them."
    )
    parser.add_argument("names", nargs="*", help="such as 1_first_tour; by default all")
    parser.add_argument(
        "--limit", type=float, default=LIMIT, help="seconds per notebook (%(default)g)"
    )
    parser.add_argument(
        "--strip", action="store_true", help="only remove the outputs from the files"
    )
    options = parser.parse_args(arguments)
    with reporting_errors():
        paths = notebooks(options.names)
        if options.strip:
            for path in paths:
                write_bytes(path, stripped(path.read_text(encoding="utf-8")).encode("utf-8"))
            return
        failures, took = [], {}
        for path in paths:
            if not is_stripped(path):
                remedy = "remove them: python -m notebooks.execute --strip"
                failures.append(f"{path.name} contains outputs or metadata; {remedy}")
            try:
                took[path.stem] = execute(path, options.limit)
            except LoraqError as error:
                failures.append(str(error))
        for name, seconds in took.items():
            print(f"{name:<24} {seconds:5.0f} s")
        if failures:
            raise LoraqError("\n".join(failures))


if __name__ == "__main__":
    main()
