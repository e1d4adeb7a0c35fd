"""A comparison as text for a terminal and as data for machines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orchestrator.compare.figures import FIGURES
from orchestrator.compare.groups import Comparison, finding, shown_value

_BEST = "*"


def as_text(comparison: Comparison, width: int) -> str:
    """The finding, what differs, figures with `*` at the best, intervals over seeds, and cautions.

    Runs are lines; where these are longer than `width` characters, they are columns.
    """
    parts = [finding(comparison), aligned(_runs(comparison), width)]
    if comparison.repeated:
        parts.append("Over seeds, mean ± half of the 95 % interval:\n" + aligned(_groups(comparison), width))
    parts += comparison.cautions
    return "\n\n".join(parts)


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """The same as JSON-ready data."""
    differs = comparison.differs
    return {
        "finding": finding(comparison),
        "differs": list(differs),
        "runs": [
            {"name": run.name, "address": run.address, "status": run.status, "seed": run.seed, "figures": run.figures}
            | {"differs": {key: values[i] for key, values in differs.items()}}
            for i, run in enumerate(comparison.runs)
        ],
        "groups": [
            {"label": group.label, "runs": [run.name for run in group.runs], "differs": group.values}
            | {"figures": {f.name: found._asdict() for f in FIGURES if (found := group.figure(f.name)) is not None}}
            for group in comparison.groups
        ],
        "best": {figure.name: sorted(comparison.best_runs(figure)) for figure in FIGURES},
        "cautions": list(comparison.cautions),
    }


def aligned(rows: Sequence[Sequence[str]], width: int) -> str:
    """`rows`, the first of them the head, in columns; turned by a quarter if that is what fits into `width`."""
    turned = list(zip(*rows, strict=True))
    straight, other = _columns(rows), _columns(turned)
    return straight if _width(straight) <= width or _width(other) > _width(straight) else other


def _columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(size) if i == 0 else cell.rjust(size) for i, (cell, size) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _width(text: str) -> int:
    return max(map(len, text.split("\n")))


def _runs(comparison: Comparison) -> list[list[str]]:
    best = {figure.name: comparison.best_runs(figure) for figure in FIGURES}
    rows = [["run", *comparison.differs, *(figure.title for figure in FIGURES)]]
    for i, run in enumerate(comparison.runs):
        name = run.name if run.finished else f"{run.name} ({run.status})"
        values = [shown_value(column[i]) for column in comparison.differs.values()]
        figures = [f.shown(run.figures.get(f.name)) + (_BEST if run.name in best[f.name] else "") for f in FIGURES]
        rows.append([name, *values, *figures])
    return rows


def _groups(comparison: Comparison) -> list[list[str]]:
    best = {figure.name: comparison.best_groups(figure) for figure in FIGURES}
    rows = [["job", "runs", *(figure.title for figure in FIGURES)]]
    for group in comparison.groups:
        cells: list[str] = []
        for figure in FIGURES:
            found = group.figure(figure.name)
            spread = f" ± {figure.shown(found.half)}" if found and found.half is not None else ""
            mark = _BEST if group.label in best[figure.name] else ""
            cells.append(figure.shown(found.mean if found else None) + spread + mark)
        rows.append([group.label, str(len(group.runs)), *cells])
    return rows
