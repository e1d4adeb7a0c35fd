"""Writes a job file with comments for what a user has: text, rows, a teacher, a cluster."""

from __future__ import annotations

import json
import re
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import JsonValue

from orchestrator.errors import SpecError
from orchestrator.init.sizes import QUICKSTART, QUICKSTART_VOCABULARY, Machine, Windows, cut, trained_tokenizer
from orchestrator.init.teacher import TeacherFolder, pruned_student, share, small_student
from orchestrator.init.text import Found, Sample, lengths, read_sample
from orchestrator.plan.make import make_plan
from orchestrator.plan.sizes import decoder
from orchestrator.spec.data import StdlibSource
from orchestrator.spec.job import NAME_PATTERN
from orchestrator.spec.load import literal, load_job

SMALL, MEDIUM = (
    (
        {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2},
        {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3},
    ),
    (
        {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2},
        {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4},
    ),
)
"""(student, teacher) for a teacher that is trained here: on little text, and on plenty."""
LINE = 120
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True}


@dataclass(frozen=True)
class Wanted:
    """The data, teacher and machine that the user has."""

    text: Found
    teacher: TeacherFolder | None
    cluster: bool
    machine: Machine


def write_job(file: Path, wanted: Wanted, *, force: bool = False) -> None:
    """Write the job file; raises `SpecError` where there is one already, `DataError` for a corpus that is too small."""
    if file.exists() and not force:
        raise SpecError(f"{file} is there already; name another file, or replace it with --force")
    text = job_text(wanted, file.name)
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SpecError(f"{file}: cannot be written: {error.strerror}") from error
    make_plan(load_job(file))


def job_text(wanted: Wanted, file: str = "job.yaml") -> str:
    """The job file for `wanted`, to be called `file`, sized to its corpus and machine."""
    quickstart = isinstance(wanted.text.source, StdlibSource)
    sample = None if quickstart else read_sample(wanted.text.source)
    windows, vocabulary = _measured(wanted, sample)
    template = _templates().get_template("job.yaml.j2")
    return template.render(
        file=file,
        name=_name(wanted),
        about=wanted.text.about,
        source=_flow({"kind": wanted.text.source.kind} | wanted.text.source.model_dump(mode="json", exclude_defaults=True)),
        undecodable=sample.undecodable if sample else 0,
        windows=windows,
        vocabulary=vocabulary,
        machine=wanted.machine,
        cluster=wanted.cluster,
        gpus=_gpus(wanted.machine),
        **_models(wanted.teacher, windows),
    )


def _measured(wanted: Wanted, sample: Sample | None) -> tuple[Windows, int | None]:
    """The windows, and the size of the vocabulary where a tokenizer is to be trained."""
    from tokenizers import Tokenizer

    positions = wanted.teacher.positions if wanted.teacher else None
    longest = min(QUICKSTART.seq_len, positions or QUICKSTART.seq_len)
    if sample is None:
        return replace(QUICKSTART, seq_len=longest), None if wanted.teacher else QUICKSTART_VOCABULARY
    if wanted.teacher is not None:
        return cut(lengths(Tokenizer.from_file(str(wanted.teacher.tokenizer)), sample.documents), longest), None
    tokenizer = trained_tokenizer(sample)
    return cut(lengths(tokenizer, sample.documents), longest), tokenizer.get_vocab_size()


def _models(teacher: TeacherFolder | None, windows: Windows) -> dict[str, Any]:
    """Return the template's values for teacher and student."""
    if teacher is None:
        student, model = MEDIUM if windows.plenty else SMALL
        return {
            "teacher": None,
            "teacher_config": _flow(model | HEADS),
            "student": {"type": "llama", "config": _flow(student | HEADS)},
            "pruned": None,
            "share": "",
        }
    pruned, small = pruned_student(teacher), small_student(teacher)
    names = {"layers": "num_hidden_layers", "intermediate_size": "intermediate_size"}
    smaller = teacher.config | {names[key]: value for key, value in (pruned or {}).items()}
    made = decoder(teacher.type, smaller) if pruned else decoder(small["type"], small["config"], teacher.vocab_size)
    return {
        "teacher": teacher,
        "teacher_path": _quoted(teacher.path),
        "student": {"type": small["type"], "config": _flow(small["config"])},
        "pruned": _flow({"kind": "pruned", **pruned}) if pruned else None,
        "share": share(made, teacher.shape),
    }


def _gpus(machine: Machine) -> tuple[float, float] | None:
    """GPUs for (the teacher's shard, a training worker); one GPU is shared by both."""
    if not machine.gpus:
        return None
    return (0.5, 0.5) if machine.gpus == 1 else (1, 1)


def _name(wanted: Wanted) -> str:
    """A name for the run, from what is distilled."""
    source = wanted.text.source
    paths: tuple[str, ...] = getattr(source, "paths", ())
    if not paths:
        named = Path(wanted.teacher.path).name if wanted.teacher else "quickstart"
    else:
        parts = [part for part in Path(paths[0]).parts if not set(part) & set("*?[/")]
        named = Path(parts[-1]).stem if parts and parts[-1] not in (".", "..") else "distilled"
    name = re.sub(r"[^a-z0-9._-]+", "-", named.lower()).strip("-._")[:63]
    return name if re.fullmatch(NAME_PATTERN, name) else "distilled"


def _flow(value: JsonValue) -> str:
    """`value` as YAML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return _quoted(value) if isinstance(value, str) else json.dumps(value)


def _quoted(text: str) -> str:
    """`text` as YAML, without quotation marks where it reads as text without them."""
    text = str(literal(text))
    plain = re.fullmatch(r"[A-Za-z][A-Za-z_]*", text) and text.lower() not in (
        "true",
        "false",
        "null",
        "yes",
        "no",
        "on",
        "off",
    )
    return text if plain else json.dumps(text, ensure_ascii=False)


def _templates() -> Environment:
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters["folded"] = _folded
    return templates


def _folded(flow: str, before: str) -> str:
    """`flow`, which stands behind `before` on its line, over several lines where it is long; a comment stays one."""
    after = "# " if before.startswith("#") else ""
    indent = after + " " * (len(before) - len(after) + 1)
    return "\n".join(textwrap.wrap(flow, LINE, initial_indent=before, subsequent_indent=indent, break_long_words=False))
