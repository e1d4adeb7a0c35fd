"""`distill init`: a job file to start from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def init(
    file: Annotated[Path, typer.Argument(metavar="[FILE]", help="Job file to write.")] = Path("job.yaml"),
    text: Annotated[
        str | None, typer.Option(metavar="FOLDER|GLOB", help="Text to distil on: a folder, or a glob in quotes.")
    ] = None,
    rows: Annotated[str | None, typer.Option(metavar="FILE", help="Rows of prompts and responses, .jsonl or .parquet.")] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Column of the prompt in --rows; guessed if left out.")
    ] = None,
    response: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column that is learnt; guessed if left out.")] = None,
    teacher: Annotated[
        str | None, typer.Option(metavar="FOLDER|NAME", help="Own teacher: a model folder, or a name of the Hugging Face hub.")
    ] = None,
    cluster: Annotated[bool, typer.Option("--cluster", help="For a Ray cluster: shared storage, several workers.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE.")] = False,
) -> None:
    """Write a commented job file for what you have; without options, the quickstart."""
    from orchestrator.errors import SpecError
    from orchestrator.init.sizes import this_machine
    from orchestrator.init.teacher import teacher_found
    from orchestrator.init.text import rows_found, standard_library, text_found
    from orchestrator.init.write import Wanted, write_job

    if text and rows:
        raise SpecError("--text and --rows: give one of them; a job reads one source")
    if (prompt or response) and not rows:
        raise SpecError("--prompt and --response name columns of --rows FILE, which is not given")
    found = text_found(text) if text else rows_found(rows, prompt, response) if rows else standard_library()
    wanted = Wanted(found, teacher_found(teacher) if teacher else None, cluster, this_machine())
    write_job(file, wanted, force=force)
    for note in found.notes:
        print(note, file=sys.stderr)
    print(f"wrote {file}: {found.about}. Next:")
    run = f"distill submit {file} --address HEAD:8265" if cluster else f"distill run {file}"
    print(f"  distill plan {file}\n  {run}")
