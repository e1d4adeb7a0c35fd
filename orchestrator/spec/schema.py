"""The JSON schema of a job file, used as a map: which section, kind and key stands where."""

from __future__ import annotations

from functools import cache
from typing import Any, cast

from pydantic import JsonValue

from orchestrator.spec.job import Job
from orchestrator.spec.reader import Keys, Section

Node = dict[str, Any]
"""A piece of the JSON schema."""


def job_schema() -> Node:
    """The JSON schema of a job file."""
    return Job.model_json_schema()


@cache
def root() -> Node:
    """The schema to look things up in; not to be changed."""
    return job_schema()


def plain(node: Node) -> Node:
    """`node` behind its reference, and without the null beside it."""
    if "$ref" in node:
        return plain(root()["$defs"][node["$ref"].rsplit("/", 1)[1]])
    options = [option for option in node.get("anyOf", ()) if option.get("type") != "null"]
    return plain(options[0]) if len(options) == 1 else node


def kinds(node: Node) -> list[str]:
    """The kinds there are of the section `node`; none for a section that has no kinds."""
    return list(plain(node).get("discriminator", {}).get("mapping", ()))


def of_kind(node: Node, kind: JsonValue) -> Node:
    """The section `node` where it is of `kind`; nothing for an unknown kind."""
    if kind not in kinds(node):
        return {}
    return plain({"$ref": plain(node)["discriminator"]["mapping"][kind]})


def branch(options: list[Node], title: str | int) -> Node:
    """That of the `options` of a union which is called `title`; nothing for a plain value."""
    return next((found for found in map(plain, options) if found.get("title") == title), Node())


def variant(node: Node, data: Section) -> Node:
    """Return the schema that the keys of the section `data` are checked against; empty for an unknown kind."""
    return of_kind(node, data.get("kind", _default_kind(node))) if kinds(node) else plain(node)


def child(node: Node, key: str | int) -> Node:
    """Return the schema in `node` of its item `key`; empty for an unknown one."""
    found: Any
    if isinstance(key, int):
        first = node.get("prefixItems", ())
        found = first[key] if key < len(first) else node.get("items")
    else:
        found = node.get("properties", {}).get(key) or node.get("additionalProperties")
    return cast(Node, found) if isinstance(found, dict) else {}


def fill_kinds(data: Section | list[JsonValue], node: Node | None = None) -> None:
    """Writes the default `kind` into the sections of `data` that leave it out."""
    node = root() if node is None else node
    if isinstance(data, dict):
        if default := _default_kind(node):
            data.setdefault("kind", default)
        node = variant(node, data)
    for key, value in data.items() if isinstance(data, dict) else enumerate(data):
        if isinstance(value, dict | list):
            fill_kinds(value, child(node, key))


def drop_stale(data: Section, section: Keys, kind: JsonValue) -> None:
    """Takes out of the section of `data` what its present kind knows and its new `kind` does not."""
    node = root()
    for key in section:
        node, inner = child(variant(node, data), key), data.get(str(key))
        if not isinstance(inner, dict):
            return
        data = inner
    chosen = of_kind(node, kind)
    if chosen:
        for key in set(variant(node, data).get("properties", ())) - set(chosen["properties"]):
            data.pop(key, None)


def dotted_keys(node: Node | None = None, prefix: str = "") -> list[str]:
    """Every key that a job file may have outside of lists, dotted, each once whatever kinds of sections have it."""
    node = plain(root() if node is None else node)
    nodes = [of_kind(node, kind) for kind in kinds(node)] or [node]
    found: dict[str, None] = {}
    for properties in (n.get("properties", {}) for n in nodes):
        for key, inner in properties.items():
            found |= dict.fromkeys(dotted_keys(inner, f"{prefix}{key}.") or [f"{prefix}{key}"])
    return list(found)


def _default_kind(node: Node) -> str | None:
    default: Node = node.get("default") or {}
    return default.get("kind") if kinds(node) else None
