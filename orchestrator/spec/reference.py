"""The key reference as Markdown, made from the schema: every section of a job file, its keys, defaults and meanings."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterator
from typing import Any

from orchestrator.spec.schema import Node, root

HEAD = """# Every key of a job file

Made by `distill schema --markdown` from the code. Every key has a default, except those marked required. A section with a
`kind` is one of several; its kind decides which keys it has.
"""
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
_TYPES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}
_HIGHEST = 2**31
"""A bound above this is that of the machine, not of the meaning."""


def reference_markdown() -> str:
    """Every section of a job file, top sections first."""
    sections = dict(_sections())
    titles = {name: title for name, (title, _) in sections.items()}
    parts = [HEAD, *(_section(title, node, titles) for title, node in sections.values())]
    return "\n".join(parts)


def _sections() -> Iterator[tuple[str, tuple[str, Node]]]:
    """(name in the schema, (title, node)) of every section, each once, by how deep in a job file it first stands."""
    seen: set[str] = {"JsonValue"}
    queue: deque[tuple[str, Node]] = deque([("", root())])
    yield "", ("The file", root())
    while queue:
        path, section = queue.popleft()
        for key, node in section.get("properties", {}).items():
            inner = f"{path}.{key}" if path else key
            for name in _referred(node):
                if name in seen:
                    continue
                seen.add(name)
                found: Node = root()["$defs"][name]
                kinds = _kinds(found)
                yield name, (inner + (f" ({', '.join(kinds)})" if kinds else ""), found)
                queue.append((inner, found))


def _section(title: str, node: Node, titles: dict[str, str]) -> str:
    """One section: heading, description, table of keys."""
    lines = [f"## {title}", ""]
    if title != "The file" and (about := node.get("description")):
        lines += [_one_line(about), ""]
    lines += ["| key | value | default | meaning |", "|---|---|---|---|"]
    required = node.get("required", ())
    for key, value in node.get("properties", {}).items():
        default = "required" if key in required else _default(value)
        lines.append(f"| `{key}` | {_value(value, titles)} | {default} | {_one_line(value.get('description', ''))} |")
    return "\n".join([*lines, ""])


def _value(node: Node, titles: dict[str, str]) -> str:
    """Describe the values that a key may have."""
    if "$ref" in node:
        title = titles.get(_name(node["$ref"]))
        return f"[{title}](#{_anchor(title)})" if title else "any value"
    if options := node.get("anyOf") or node.get("oneOf"):
        return " or ".join(dict.fromkeys(_value(option, titles) for option in options))
    if "const" in node:
        return f"`{node['const']}`"
    if "enum" in node:
        return ", ".join(f"`{value}`" for value in node["enum"])
    if node.get("type") == "array":
        items = node.get("prefixItems") or [node.get("items", {})]
        return f"list of {', '.join(dict.fromkeys(_value(item, titles) for item in items))}"
    if node.get("type") == "object":
        return "keys and values"
    bounds = " ".join(f"{sign} {node[key]:,}" for key, sign in _BOUNDS.items() if key in node and node[key] < _HIGHEST)
    return f"{_TYPES.get(node.get('type', ''), node.get('type', 'any value'))} {bounds}".rstrip()


def _default(node: Node) -> str:
    value: Any = node.get("default")
    if isinstance(value, dict):
        return f"kind `{value['kind']}`" if "kind" in value else ""
    if value and "discriminator" in node.get("items", {}):
        return ", ".join(f"kind `{item['kind']}`" for item in value)
    return f"`{json.dumps(value)}`"


def _referred(node: Node) -> Iterator[str]:
    """Names of the sections that may stand at `node`."""
    if "$ref" in node:
        yield _name(node["$ref"])
    inner: list[Node] = [*node.get("anyOf", ()), *node.get("oneOf", ()), *node.get("prefixItems", ())]
    for option in [*inner, node["items"]] if "items" in node else inner:
        yield from _referred(option)


def _kinds(section: Node) -> list[str]:
    kind: Node = section.get("properties", {}).get("kind", {})
    return [kind["const"]] if "const" in kind else list(kind.get("enum", ()))


def _name(reference: str) -> str:
    return reference.rsplit("/", 1)[1]


def _anchor(title: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
