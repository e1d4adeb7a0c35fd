"""The verbs for several runs: compare them, and run a job over a grid."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.options import AsJson, JobFile, Overrides, Quiet, Storage, Verbose
from orchestrator.cli.usage import group
from orchestrator.errors import SpecError

PAGE = Path("compare.html")

experiments_app = group()

Out = Annotated[Path, typer.Option(metavar="FILE", help="Where to write the page.")]


@experiments_app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN", help="Run directories, or names of runs (see --storage).")],
    storage: Storage = None,
    out: Out = PAGE,
    as_json: AsJson = False,
) -> None:
    """Put runs side by side: what differs, figures, and means over seeds; in the terminal and as a page with curves."""
    if len(runs) < 2:
        raise SpecError(f"compare: give at least two runs, such as: distill compare {runs[0]} {runs[0]}-2")
    _show(runs, storage, out, as_json)


@experiments_app.command()
def sweep(
    job: JobFile,
    axes: Annotated[
        list[str],
        typer.Option("--grid", metavar="KEY=a,b,c", help="A key of the job file and its values; several make a product."),
    ],
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs, start nothing.")] = False,
    out: Out = PAGE,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Run a job at every point of a grid, on one Ray and with shared labels, and compare; the same again continues."""
    from orchestrator.run_lookup import is_run
    from orchestrator.store.files import open_store
    from orchestrator.sweep import parse_grid, points

    grid = parse_grid(axes)
    if dry_run:
        for number, point in enumerate(points(job, grid, overrides or []), 1):
            print(f"{number}  {point}")
        return
    from orchestrator.api import sweep as run_sweep

    with contextlib.redirect_stdout(sys.stderr):  # Ray prints its warnings to stdout
        ended = run_sweep(job, grid, overrides or [])
    begun = [ran.run for ran in ended if is_run(open_store(ran.run))]
    if begun:
        _show(begun, None, out, as_json)
    failed = next((ran.error for ran in ended if ran.error is not None), None)
    if failed is not None:
        raise typer.Exit(failed.exit_code)


def _show(runs: Sequence[str], storage: str | None, out: Path, as_json: bool) -> None:
    from orchestrator.compare.groups import compared
    from orchestrator.compare.page import write_page
    from orchestrator.compare.read import read_runs
    from orchestrator.compare.table import as_dict, as_text

    comparison = compared(read_runs(runs, storage))
    page = write_page(comparison, out)
    if as_json:
        print(json.dumps(as_dict(comparison) | {"page": str(page)}))
    else:
        width = shutil.get_terminal_size().columns
        print(f"{as_text(comparison, width)}\n\npage: {page}")
