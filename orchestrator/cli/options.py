"""Arguments and options that several verbs have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="Job file (YAML).")]
Overrides = Annotated[list[str] | None, typer.Option("--set", "-c", metavar="a.b=c", help="Override a value of the job file.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print data for machines on stdout.")]
Storage = Annotated[str | None, typer.Option(help="Where runs are looked for by name; default: ./distill-store.")]
