"""Base of every section of a job file: frozen, strict, closed to unknown keys; and marks of fields that change no result."""

from __future__ import annotations

from typing import Any, cast

from pydantic import BaseModel, ConfigDict


class Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


class _NoResult:
    """Marks a field, as in `workers: Annotated[int, NO_RESULT]`, or a whole section."""

    def __repr__(self) -> str:
        return "NO_RESULT"


NO_RESULT = _NoResult()
"""Says of a field that it changes no weight, label or figure except by rounding: how fast, where, and how safely work is done.
Stored results, and the run itself, are found again when such a field changes. A field without the mark is part of their
identity."""


def result_fields(value: Any) -> Any:
    """`value` as JSON-ready data, without the fields of its sections, at any depth, that are marked `NO_RESULT`."""
    match value:
        case Spec():
            fields = type(value).model_fields.items()
            return {name: result_fields(getattr(value, name)) for name, field in fields if NO_RESULT not in field.metadata}
        case dict():
            return {key: result_fields(item) for key, item in cast(dict[str, Any], value).items()}
        case list() | tuple():
            return [result_fields(item) for item in cast(list[Any], value)]
        case _:
            return value


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Sections of the JSON-ready `value`, and lists of them, as one level of dotted keys; a list of plain values is one."""
    if isinstance(value, dict):
        items = list(cast(dict[str, Any], value).items())
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in cast(list[Any], value)):
        items = [(str(index), item) for index, item in enumerate(cast(list[Any], value))]
    else:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, item in items:
        found |= flat(item, f"{prefix}.{key}" if prefix else key)
    return found
