"""The `distill` command. Nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import traceback
from typing import Annotated, NoReturn

import typer

from orchestrator.cli.cluster import cluster_app
from orchestrator.cli.dashboards import dashboards_app
from orchestrator.cli.experiments import experiments_app
from orchestrator.cli.init import init
from orchestrator.cli.labels import labels_app
from orchestrator.cli.run import run_app
from orchestrator.cli.runs import runs_app
from orchestrator.cli.usage import Interrupted, explain, group
from orchestrator.errors import DistillError, Terminated, find_user_error, one_line
from orchestrator.runtime.environment import job_tags
from orchestrator.runtime.signals import heed_signals

app = group("distill", "Distil language models: a teacher pool writes soft labels, students learn from them.")
app.command()(init)
app.add_typer(run_app)
app.add_typer(runs_app)
app.add_typer(experiments_app)
app.add_typer(labels_app)
app.add_typer(cluster_app)
app.add_typer(dashboards_app)


def _show_version(wanted: bool) -> None:
    if wanted:
        from orchestrator.runtime.versions import own_version

        print(f"distill {own_version()}")
        raise typer.Exit


@app.callback()
def distill(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Distil language models: a teacher pool writes soft labels, students learn from them."""


def main() -> None:
    """Run the command and end with the exit code that the contract gives its outcome."""
    args = sys.argv[1:]
    heed_signals()
    try:
        sys.exit(app(args, prog_name="distill", standalone_mode=False))
    except (KeyboardInterrupt, Interrupted, typer.Abort) as stop:
        terminated = isinstance(stop.__cause__ if isinstance(stop, Interrupted) else stop, Terminated)
        _say_stopped("terminated" if terminated else "interrupted", args)
        _end_at_once(143 if terminated else 130)
    except typer.TyperException as error:
        _say(explain(error, app, args))
        sys.exit(2)
    except Exception as error:
        sys.exit(_explain(error))


def _end_at_once(code: int) -> NoReturn:
    """End the process with `code`, without taking the interpreter down.

    Everything has been closed by now. Libraries whose threads were stopped halfway can crash an interpreter that is taken down
    (a segmentation fault was seen), and a process that dies by a signal does not tell its exit code.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _explain(error: Exception) -> int:
    """Print `error` as a user should see it; returns the exit code."""
    known: DistillError | None = find_user_error(error)
    if known is None and "ray" in sys.modules:
        from orchestrator.errors import ResumableError
        from orchestrator.runtime.session import lost_cluster

        known = ResumableError(f"cluster lost; run the same job again to resume: {error}") if lost_cluster(error) else None
    if known is None:
        traceback.print_exception(error)
        _say("the above is a fault of this program, please report it; what is finished is kept, and can be gone on with")
        return 1
    logging.getLogger("orchestrator").debug("how it came to this", exc_info=error)
    _say(str(known))
    return known.exit_code


def _say_stopped(how: str, args: list[str]) -> None:
    """Print that a command was `how` ("interrupted", "terminated"); of a run, that its work is kept and how to go on.

    On a cluster the command is not the one that the user gave, and is left out.
    """
    again = "" if job_tags() else f": {shlex.join(['distill', *args])}"
    kept = f"; what was done is kept; run the same job again to continue{again}" if args[:1] in (["run"], ["sweep"]) else ""
    print(one_line(how + kept), file=sys.stderr)


def _say(text: str) -> None:
    print(f"distill: {one_line(text)}", file=sys.stderr)
