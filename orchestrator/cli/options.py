"""Arguments and options that several verbs have."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

PACKAGE = "orchestrator"


def job_keys(incomplete: str) -> list[str]:
    """Keys of a job file that begin with `incomplete`, as `train.steps=`; for shells that complete."""
    from orchestrator.spec.schema import dotted_keys

    return [f"{key}=" for key in dotted_keys() if key.startswith(incomplete)]


def _talk(quiet: bool) -> None:
    if quiet:
        logging.getLogger(PACKAGE).setLevel(logging.WARNING)


def _talk_more(verbose: bool) -> None:
    if verbose:
        log = logging.getLogger(PACKAGE)
        log.setLevel(logging.DEBUG)
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
        log.addHandler(handler)


JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="Job file (YAML).")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-c", metavar="a.b=c", help="Override a value of the job file.", autocompletion=job_keys),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", callback=_talk, help="Only warnings, errors and the result.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", callback=_talk_more, help="Say what is done in detail; errors with their traceback.")
]
Storage = Annotated[str | None, typer.Option(help="Where runs are looked for by name; default: ./distill-store.")]
