"""From a job file and `--set` overrides to a `Job`; whatever is wrong with them becomes one line that says where."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, cast

from pydantic import JsonValue, ValidationError

from orchestrator.errors import EnvironmentFault, SpecError
from orchestrator.spec.job import Job
from orchestrator.spec.problems import origin, report, show
from orchestrator.spec.reader import UNFIT_TEXT, Keys, Reader, Section, clip, dotted
from orchestrator.spec.schema import drop_stale, fill_kinds, job_schema

__all__ = ["job_schema", "literal", "load_job", "resolved_yaml"]

MAX_BYTES = 250_000  # the YAML parser needs a second for a few times as much
_OVERRIDE = re.compile(r"([\w-]+(?:\.[\w-]+){0,20})=(.*)", re.ASCII | re.DOTALL)


def load_job(path: str | Path, overrides: Sequence[str] = (), *, interpolate: bool = True) -> Job:
    """The job in the YAML file `path`, with `overrides` (`a.b=c`) put in.

    Without `interpolate`, text keeps its `${oc.env:X}` as written, for a machine that has X; other values may not have one.
    Raises `SpecError`, one line with file, line and key, for whatever is wrong with either, and `EnvironmentFault`
    for a file that cannot be read.
    """
    name = str(path) if len(str(path)) <= 100 else "…" + str(path)[-99:]
    reader = Reader(_read_text(Path(path), name), name)
    data = reader.read()
    if not isinstance(data, dict):
        raise SpecError(f"{name}: a job file must be a mapping of keys, got {show(data)}")
    origins = reader.origins | {(): name}
    if overrides:
        data = _merge(data, [_parse_override(text) for text in overrides], origins)
    secrets: dict[Keys, str] = {}
    if interpolate:
        data = {key: _interpolate(value, (key,), origins, secrets) for key, value in data.items()}
    fill_kinds(data)
    try:
        return Job.model_validate_json(json.dumps(data))
    except ValidationError as error:
        raise SpecError(report(error.errors(include_url=False), origins, secrets)) from None


def resolved_yaml(job: Job, *, interpolated: bool = True) -> str:
    """`job` with every default written out, as YAML that `load_job` reads back to an equal job.

    `interpolated` says whether the job was loaded that way.
    """
    from ruamel.yaml import YAML

    yaml: Any = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.allow_unicode, yaml.width = False, MAX_BYTES  # the emitter loses spaces where it folds a line
    yaml.sort_base_mapping_type_on_output = False
    stream = StringIO()
    data = job.model_dump(mode="json")
    yaml.dump(literal(data) if interpolated else data, stream)
    return stream.getvalue()


def literal(value: JsonValue) -> JsonValue:
    """`value` with each `${` in its text written so that it stays as it is."""
    if isinstance(value, dict):
        return {key: literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [literal(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _read_text(path: Path, name: str) -> str:
    """The text of the file `path`. Raises `SpecError`, or `EnvironmentFault` where the system refuses to read it."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise SpecError(f"{name}: no such file; distill init writes a job file") from None
    except IsADirectoryError:
        raise SpecError(f"{name}: is a directory, not a job file") from None
    except OSError as error:
        raise EnvironmentFault(f"{name}: cannot be read: {error.strerror}") from None
    if len(raw) > MAX_BYTES:
        raise SpecError(f"{name}: larger than {MAX_BYTES} bytes, which no job needs")
    if raw.startswith(b"\xef\xbb\xbf"):
        raise SpecError(f"{name}:1:1: starts with a byte order mark; save it as UTF-8 without one")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise SpecError(f"{name}:{line}: byte 0x{raw[error.start]:02x} is not UTF-8") from None


# Overrides and the environment.


@dataclass(frozen=True)
class _Override:
    label: str
    key: str
    keys: Keys
    value: JsonValue
    origins: dict[Keys, str]


def _parse_override(text: str) -> _Override:
    """The override `a.b=c`, c being YAML. Raises `SpecError`."""
    label = f"--set {clip(text, 80)}"
    match = _OVERRIDE.fullmatch(text)
    if not match:
        raise SpecError(f"{label}: expected KEY=VALUE with a dotted key such as train.steps=100")
    keys: Keys = tuple(int(part) if part.isdecimal() else part for part in match[1].split("."))
    reader = Reader(match[2], label, keys, lines=False)
    return _Override(label, match[1], keys, reader.read(), {keys: label} | reader.origins)


def _merge(data: Section, overrides: list[_Override], origins: dict[Keys, str]) -> Section:
    """`data` with `overrides` put in, in their order; `origins` learns of them. Raises `SpecError`."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for override in overrides:
        if override.keys[-1] == "kind":
            drop_stale(data, override.keys[:-1], override.value)
    config = OmegaConf.create(data)
    for override in overrides:
        try:
            for end in range(1, len(override.keys)):
                section = OmegaConf.select(config, ".".join(override.key.split(".")[:end]), throw_on_resolution_failure=False)
                if not OmegaConf.is_config(section):  # the update makes a section there
                    origins[override.keys[:end]] = override.label
            OmegaConf.update(config, override.key, override.value, merge=False)
        except (OmegaConfBaseException, ValueError, TypeError):
            raise SpecError(f"{override.label}: {dotted(override.keys)}: no such list item") from None
        origins.update(override.origins)
    return cast(Section, OmegaConf.to_container(config))


def _interpolate(value: JsonValue, keys: Keys, origins: dict[Keys, str], secrets: dict[Keys, str]) -> JsonValue:
    """`value`, which stands at `keys`, with `${oc.env:X}` resolved; `secrets` gets what came of it. Raises `SpecError`."""
    if isinstance(value, dict):
        return {key: _interpolate(item, (*keys, key), origins, secrets) for key, item in value.items()}
    if isinstance(value, list):
        return [_interpolate(item, (*keys, index), origins, secrets) for index, item in enumerate(value)]
    if isinstance(value, str) and "${" in value:
        value = _from_environment(value, f"{origin(keys, origins)}: {dotted(keys)}")
        secrets[keys] = value or ""
    return value


def _from_environment(text: str, where: str) -> str | None:
    """`text` with its interpolations resolved. Raises `SpecError` for a variable that is not set."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        value: str | None = OmegaConf.create([text])[0]
    except OmegaConfBaseException as error:
        variable = re.search("variable '(.*?)' not found", str(error))
        problem = f"environment variable {variable[1]} is not set" if variable else "malformed ${oc.env:VARIABLE}"
        raise SpecError(f"{where}: {problem}") from None
    if value and UNFIT_TEXT.search(value):
        raise SpecError(f"{where}: the environment variable is not UTF-8")
    return value
