"""Validation errors of a job, as one line in plain words."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import JsonValue
from pydantic_core import ErrorDetails

from orchestrator.errors import MAX_MESSAGE_CHARS, one_line
from orchestrator.spec import schema
from orchestrator.spec.reader import Keys, clip, dotted

_MEANINGS = {
    "missing": "missing, but required",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "model_type": "must be a section of keys",
    "dict_type": "must be a section of keys",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "literal_error": "must be {expected}",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "string_pattern_mismatch": "must match {pattern}",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "too_short": "must have at least {min_length} items",
    "too_long": "must have at most {max_length} items",
    "value_error": "{error}",
}


def report(errors: Sequence[ErrorDetails], origins: Mapping[Keys, str], secrets: Mapping[Keys, str]) -> str:
    """The first of `errors`, with its place from `origins` and without any of the `secrets`."""
    # A misspelt key also makes the right one missing; the misspelling is the one to name.
    error = min(errors, key=lambda error: error["type"] != "extra_forbidden")
    keys, section = _locate(error)
    problem = _explain(error, keys, section)
    for secret in secrets.values():
        problem = problem.replace(secret, "***") if len(secret) > 3 else problem
    if error["type"] not in ("missing", "extra_forbidden", "value_error"):
        hidden = any(secret[: len(keys)] == keys for secret in secrets)
        problem += ", got " + ("text from the environment" if hidden else show(_found(error)))
    if error["type"].startswith("union_tag"):
        problem += _did_you_mean(_found(error), schema.kinds(section))
    place = _place_named(problem, keys, origins) if error["type"] == "value_error" else origin(keys, origins)
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    line = ": ".join(part for part in (place, dotted(keys), problem) if part)
    return clip(one_line(line), MAX_MESSAGE_CHARS - len(more)) + more


def origin(keys: Keys, origins: Mapping[Keys, str]) -> str:
    """Return where `keys`, or the nearest enclosing section, were written."""
    return next(origins[keys[:end]] for end in range(len(keys), -1, -1) if keys[:end] in origins)


def show(value: JsonValue) -> str:
    """`value` as it may be written in YAML, short enough for a message."""
    return "nothing" if value is None else clip(json.dumps(value, ensure_ascii=False), 60)


def _locate(error: ErrorDetails) -> tuple[Keys, schema.Node]:
    """The keys in the job file behind pydantic's location, and the schema of the section around the last of them."""
    keys: Keys = ()
    node = section = schema.root()
    for part in error["loc"]:
        node = schema.plain(node)
        if schema.kinds(node):  # pydantic names the kind, which is no key
            node = schema.of_kind(node, part)
        elif options := node.get("oneOf") or node.get("anyOf"):  # pydantic names the branch of the union
            node = schema.branch(options, part)
        else:
            keys, section, node = (*keys, part), node, schema.child(node, part)
    return ((*keys, "kind"), node) if error["type"].startswith("union_tag") else (keys, section)


def _explain(error: ErrorDetails, keys: Keys, section: schema.Node) -> str:
    """Describe what is wrong, without the value."""
    if error["type"] == "extra_forbidden":
        return _unknown_key(str(keys[-1]), section.get("properties", {}))
    if error["type"].startswith("union_tag"):
        return f"must be one of {', '.join(schema.kinds(section))}"
    meaning = _MEANINGS.get(error["type"])
    return meaning.format(**error.get("ctx", {})) if meaning else error["msg"]


def _unknown_key(key: str, known: Mapping[str, Any]) -> str:
    kind = known.get("kind", {}).get("const")
    place = f" for kind {kind}" if kind else ""
    return f"unknown key{place}" + (_did_you_mean(key, known) or f"; known are {', '.join(known)}")


def _did_you_mean(word: JsonValue, known: Sequence[str] | Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(str(word)[:100], list(known), n=1)
    return f", did you mean {close[0]}?" if close else ""


def _found(error: ErrorDetails) -> JsonValue:
    """The offending value."""
    value: JsonValue = error["input"]
    return value.get("kind") if error["type"].startswith("union_tag") and isinstance(value, dict) else value


def _place_named(problem: str, keys: Keys, origins: Mapping[Keys, str]) -> str:
    """Return where the keys named by a check over a whole section were written; an override before the file."""
    words = re.findall(r"[\w.-]+", problem)
    places = [origins[path] for word in words if (path := (*keys, *word.split("."))) in origins]
    overrides = [place for place in places if place.startswith("--set ")]
    return next(iter([*overrides, *places]), origin(keys, origins))
