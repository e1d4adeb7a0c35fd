"""`distill runs`: which runs a storage holds."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.options import AsJson

if TYPE_CHECKING:
    from orchestrator.run.listing import RunSummary

runs_app = typer.Typer(rich_markup_mode=None)
_MAX_DIFFERENCES = 80


@runs_app.command()
def runs(
    where: Annotated[
        str | None,
        typer.Argument(
            metavar="[STORAGE|JOB]", help="A storage, or a job file: the runs of its name. [default: ./distill-store]"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List runs: state, time, held-out cross entropy, gap recovered, and in what a run differs from the first of its name."""
    from orchestrator.errors import SpecError
    from orchestrator.run.listing import list_runs
    from orchestrator.spec.job import Job
    from orchestrator.spec.load import load_job
    from orchestrator.store.files import open_store

    storage, name = where or Job.model_fields["storage"].default, None
    if Path(storage).is_file():
        job = load_job(storage)
        storage, name = job.storage, job.name
    elif "://" not in storage and not Path(storage).expanduser().is_dir():
        raise SpecError(
            f"{storage}: no such storage or job file; give the job's storage, or the job file: distill runs job.yaml"
        )
    found = list(list_runs(open_store(storage), name))
    if as_json:
        from dataclasses import asdict

        print(json.dumps([asdict(run) for run in found], indent=1))
    elif not found:
        print(f"no runs in {storage}")
    else:
        _print_table(found)


def _print_table(found: list[RunSummary]) -> None:
    rows = [("RUN", "STATUS", "STARTED", "TOOK", "STUDENT CE", "GAP", "DIFFERS")]
    rows += [
        (
            run.run,
            run.status,
            "" if run.started_s is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(run.started_s)),
            "" if run.seconds is None else "{}:{:02}".format(*divmod(round(run.seconds), 60)),
            "" if run.student_heldout_ce_nats is None else f"{run.student_heldout_ce_nats:.4f}",
            "" if run.gap_recovered is None else f"{run.gap_recovered:.0%}",
            _brief(", ".join(f"{key}={value}" for key, value in run.differs.items())),
        )
        for run in found
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _brief(text: str) -> str:
    return text if len(text) <= _MAX_DIFFERENCES else text[: _MAX_DIFFERENCES - 1] + "…"
