"""The charts of a comparison: what was reached, and the way there, one colour for each group of runs."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

from orchestrator.compare.figures import BY_NAME, Figure
from orchestrator.compare.groups import Comparison, Group, Interval
from orchestrator.report.charts.figure import Chart, Curve, axis_title, curve, drawn, frame, limits, plain_axis
from orchestrator.report.words import NOTHING, number
from orchestrator.tracking import names

COLORS = 8
"""Colours `$run-1` to `$run-8` of the page; further groups take them again, with another dash."""
_DASHES = ("solid", "dash", "dot", "dashdot")
_MARGINS = {"l": 56, "r": 16, "t": 10, "b": 46}
_HEIGHT = 320
_TABLE_ROWS = 9
_SKIPPED = 0.25
"""Share of the steps, at the start, that the y axis of a course is not made for: there all curves fall alike."""
_HELDOUT_CE_NATS = "heldout/ce_nats"


def color(index: int) -> str:
    """Name of the colour of group number `index`, without `$`."""
    return f"run-{index % COLORS + 1}"


def charts(comparison: Comparison) -> dict[str, Chart]:
    """All charts that the runs have data for: `reached`, `gap`, `heldout`, `ce`, `loss`."""
    found = {
        "reached": _reached(comparison, BY_NAME["heldout_ce_nats"]),
        "gap": _reached(comparison, BY_NAME["gap_recovered"]),
        "heldout": _course(comparison, _HELDOUT_CE_NATS),
        "ce": _course(comparison, names.CE_NATS),
        "loss": None if _other_objectives(comparison) else _course(comparison, names.LOSS),
    }
    return {name: chart for name, chart in found.items() if chart}


# What was reached.


def swept(groups: Sequence[Group]) -> tuple[str, list[float]] | None:
    """The one key in which `groups` differ and each group's value of it, if these are numbers; else None."""
    keys = {key for group in groups for key in group.values}
    if len(groups) < 2 or len(keys) != 1:
        return None
    (key,) = keys
    values = [group.values[key] for group in groups]
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return (key, [float(value) for value in values]) if numbers else None


def _reached(comparison: Comparison, figure: Figure) -> Chart | None:
    """A figure of each group: a dot for its mean with the interval over seeds, and small ones for its runs.

    Where the groups differ in one number alone, it is the x axis; else they stand beside each other.
    """
    if figure.on in comparison.incomparable:
        return None
    found = [(i, group, got) for i, group in enumerate(comparison.groups) if (got := group.figure(figure.name))]
    groups = [group for _, group, _ in found]
    by = swept(groups)
    if len(found) < 2 or not (by or comparison.repeated):
        return None  # the table says as much
    places = by[1] if by else [float(i) for i in range(len(groups))]
    line = [_joined(places, [got.mean for _, _, got in found])] if by else []
    dots = [d for (i, g, got), x in zip(found, places, strict=True) for d in _dots(g, got, figure, x, f"${color(i)}")]
    values = [value for group, (_, _, got) in zip(groups, found, strict=True) for value in (*_values(group, figure), *got.ends)]
    layout = _layout(limits(values), f"{figure.title}, {'nats' if figure.name.endswith('nats') else 'share'}")
    layout["hovermode"] = "closest"
    if figure.name == "gap_recovered":
        layout["yaxis"] |= {"tickformat": ".0%", "title": axis_title(figure.title)}
    if by:
        layout["xaxis"] |= {"title": axis_title(by[0]), "tickvals": sorted(set(places))} | _span(places)
    else:
        labels = [html.escape(group.label, quote=False).replace(", ", "<br>") for group in groups]
        layout["xaxis"] |= {"range": [-0.5, len(groups) - 0.5], "tickvals": places, "ticktext": labels}
    rows = [
        [
            group.label,
            figure.shown(got.mean),
            *(map(figure.shown, got.ends) if got.half is not None else (NOTHING, NOTHING)),
            str(got.n),
        ]
        for group, (_, _, got) in zip(groups, found, strict=True)
    ]
    return Chart({"data": line + dots, "layout": layout}, ["", "mean", "from", "to (95 %)", "runs"], rows)


def _dots(group: Group, got: Interval, figure: Figure, place: float, paint: str) -> list[dict[str, Any]]:
    name = html.escape(group.label, quote=False)
    base = {"type": "scatter", "mode": "markers", "name": name}
    mean = base | {"x": [place], "y": [got.mean], "marker": {"color": paint, "size": 10}}
    mean["hovertemplate"] = f"{name}<br>{figure.shown(got.mean)}<extra></extra>"
    if got.half is None:
        return [mean]
    own = _values(group, figure)
    each = base | {
        "x": [place] * len(own),
        "y": own,
        "hoverinfo": "skip",
        "opacity": 0.4,
        "marker": {"color": paint, "size": 6},
    }
    return [each, mean | {"error_y": {"type": "data", "array": [got.half], "color": paint, "thickness": 1.5, "width": 6}}]


def _joined(places: Sequence[float], means: Sequence[float]) -> dict[str, Any]:
    x, y = zip(*sorted(zip(places, means, strict=True)), strict=True)
    line = {"color": "$neutral", "width": 1.5}
    return {"type": "scatter", "mode": "lines", "x": list(x), "y": list(y), "line": line, "hoverinfo": "skip"}


def _span(places: Sequence[float]) -> dict[str, Any]:
    """The x axis for `places`: logarithmic where they spread over more than a decade, as learning rates do."""
    if min(places) > 0 and max(places) > 10 * min(places):
        return {"type": "log", "range": list(limits([math.log10(x) for x in places]))}
    return {"range": list(limits(places))}


def _values(group: Group, figure: Figure) -> list[float]:
    return [run.figures[figure.name] for run in group.runs if figure.name in run.figures]


# The way there.


def _course(comparison: Comparison, metric: str) -> Chart | None:
    """A metric of the students by step: a line for each group, the mean over its seeds, which are drawn faintly."""
    shown: list[Curve] = []
    faint: list[Curve] = []
    for index, group in enumerate(comparison.groups):
        dash, paint = _DASHES[index // COLORS % len(_DASHES)], f"${color(index)}"
        name = html.escape(group.label, quote=False)
        own = [c for run in group.runs if (c := curve(run.points, "student", metric, name, paint, dash))]
        if not own:
            continue
        shown.append(own[0] if len(own) == 1 else _mean(own))
        faint += [c._replace(raw=c.y) for c in own] if len(own) > 1 else []
    if not shown:
        return None
    first, last = min(c.x[0] for c in shown), max(c.x[-1] for c in shown)
    late = [y for c in shown + faint for x, y in zip(c.x, c.y, strict=True) if x >= first + _SKIPPED * (last - first)]
    layout = _layout(limits(late), "nats per token")
    layout["xaxis"] |= {"range": [first, last if last > first else first + 1], "title": axis_title("step")}
    data = [drawn(c, faint=True) for c in faint] + [drawn(c) for c in shown]
    return Chart({"data": data, "layout": layout}, *_table(shown))


def _mean(curves: Sequence[Curve]) -> Curve:
    """The mean of `curves` at the steps that all of them have."""
    values = [dict(zip(c.x, c.y, strict=True)) for c in curves]
    x = [step for step in curves[0].x if all(step in own for own in values)]
    return curves[0]._replace(x=x, raw=[], y=[sum(own[step] for own in values) / len(values) for step in x])


def _other_objectives(comparison: Comparison) -> bool:
    """Whether the runs minimised different things, so that their losses are no measure of each other."""
    return any(key.startswith(("objective.", "labels.")) for group in comparison.groups for key in group.values)


def _layout(span: tuple[float, float], unit: str) -> dict[str, Any]:
    axes = {
        "xaxis": plain_axis() | {"showgrid": False},
        "yaxis": plain_axis() | {"range": list(span), "title": axis_title(unit)},
    }
    return frame(_HEIGHT) | {"margin": _MARGINS} | axes


def _table(curves: Sequence[Curve]) -> tuple[list[str], list[list[str]]]:
    """Values at a few steps of the longest of `curves`, evenly chosen."""
    steps = max((c.x for c in curves), key=len)
    chosen = sorted({i * (len(steps) - 1) // (_TABLE_ROWS - 1) for i in range(_TABLE_ROWS)})
    values = [dict(zip(c.x, c.y, strict=True)) for c in curves]
    rows = [[f"{steps[i]:.0f}", *(number(own.get(steps[i]), 4) for own in values)] for i in chosen]
    return ["step", *(html.unescape(c.label) for c in curves)], rows
