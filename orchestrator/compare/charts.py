"""The charts of a comparison: what was reached, and the way there, one colour for each group of runs."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from orchestrator.compare.figures import BY_NAME, Figure
from orchestrator.compare.groups import ABSENT, Comparison, Group, Interval, described
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


def color(index: int) -> str:
    """Name of the colour of group number `index`, without `$`."""
    return f"run-{index % COLORS + 1}"


def is_dashed(index: int) -> bool:
    """Return whether the lines of group number `index` share their colour with those of an earlier group."""
    return index >= COLORS


def charts(comparison: Comparison) -> dict[str, Chart]:
    """All charts that the runs have data for: `reached`, `gap` or where there is no baseline `kl`, `heldout`, `ce`, `loss`."""
    gap = _reached(comparison, BY_NAME["gap_recovered"])
    found = {
        "reached": _reached(comparison, BY_NAME["heldout_ce_nats"]),
        "gap": gap,
        "kl": None if gap else _reached(comparison, BY_NAME["kl_to_teacher_nats"]),
        "heldout": _course(comparison, names.HELDOUT_CE_NATS),
        "ce": _course(comparison, names.CE_NATS),
        "loss": None if _other_objectives(comparison) else _course(comparison, names.LOSS),
    }
    return {name: chart for name, chart in found.items() if chart}


# Charts of the figures that were reached.


class Sweep(NamedTuple):
    """Groups by a number in which they differ."""

    key: str
    places: list[float]
    """Each group's value of `key`."""
    series: list[str]
    """Each group's remaining differences, in words; groups with equal words form one line of the chart."""


def swept(groups: Sequence[Group]) -> Sweep | None:
    """`groups` by the key with the most values among those whose values are all numbers; None where that makes no line."""
    keys = dict.fromkeys(key for group in groups for key in group.values)
    columns = {key: [group.values.get(key, ABSENT) for group in groups] for key in keys}
    numbers = {key: [float(v) for v in values] for key, values in columns.items() if all(map(_is_number, values))}
    if not numbers:
        return None
    key = max(numbers, key=lambda key: len(set(numbers[key])))
    rest = [described({k: v for k, v in group.values.items() if k != key}) for group in groups]
    return Sweep(key, numbers[key], rest) if len(set(rest)) < len(rest) else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _reached(comparison: Comparison, figure: Figure) -> Chart | None:
    """A figure of each group: a dot for its mean with the interval over seeds, and small ones for its runs.

    Where the groups differ in a number, it is the x axis; else they stand beside each other.
    """
    if figure.on in comparison.incomparable:
        return None
    found = [(i, group, got) for i, group in enumerate(comparison.groups) if (got := group.figure(figure.name))]
    groups, means = [group for _, group, _ in found], [got.mean for _, _, got in found]
    by = swept(groups) if len(groups) > 1 else None
    if len(found) < 2 or not (by or comparison.repeated):
        return None  # the table says as much
    places = by.places if by else [float(i) for i in range(len(groups))]
    dots = [d for (i, g, got), x in zip(found, places, strict=True) for d in _dots(i, g, got, figure, x)]
    values = [value for group, (_, _, got) in zip(groups, found, strict=True) for value in (*_values(group, figure), *got.ends)]
    layout: dict[str, Any] = _layout(limits(values), f"{figure.title}, nats per token") | {"hovermode": "closest"}
    if figure.name == "gap_recovered":
        layout["yaxis"] |= {"tickformat": ".0%", "title": axis_title(figure.title)}
    if by:
        layout["xaxis"] |= {"title": axis_title(by.key)} | _numbers_axis(by.places)
        layout["annotations"] = _ends(by, means) if len(set(by.series)) > 1 else []
    else:
        labels = [html.escape(group.label, quote=False).replace(", ", "<br>") for group in groups]
        layout["xaxis"] |= {"range": [-0.5, len(groups) - 0.5], "tickvals": places, "ticktext": labels}
    rows = [
        [group.label, figure.shown(got.mean), *(figure.shown(end) if got.n > 1 else NOTHING for end in got.ends), str(got.n)]
        for _, group, got in found
    ]
    return Chart({"data": _joined(by, means) + dots, "layout": layout}, ["", "mean", "from", "to (95 %)", "runs"], rows)


def _dots(index: int, group: Group, got: Interval, figure: Figure, place: float) -> list[dict[str, Any]]:
    name, paint = html.escape(group.label, quote=False), f"${color(index)}"
    marker = {"color": paint, "symbol": "circle-open"} if is_dashed(index) else {"color": paint}
    base = {"type": "scatter", "mode": "markers", "name": name}
    mean = base | {"x": [place], "y": [got.mean], "marker": marker | {"size": 10}}
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


def _joined(by: Sweep | None, means: Sequence[float]) -> list[dict[str, Any]]:
    """A thin line through the means of each series."""
    style = {"type": "scatter", "mode": "lines", "hoverinfo": "skip", "line": {"color": "$neutral", "width": 1.5}}
    return [style | {"x": list(x), "y": list(y)} for _, x, y in _series(by, means)] if by else []


def _ends(by: Sweep, means: Sequence[float]) -> list[dict[str, Any]]:
    """The words of each series over its last mean; a logarithmic axis takes exponents."""
    place = math.log10 if _is_logarithmic(by.places) else float
    style = {"showarrow": False, "xanchor": "right", "yshift": 15, "bgcolor": "$page", "font": {"color": "$muted", "size": 12}}
    return [
        style | {"x": place(x[-1]), "y": y[-1], "text": html.escape(name, quote=False)} for name, x, y in _series(by, means)
    ]


def _series(by: Sweep, means: Sequence[float]) -> list[tuple[str, tuple[float, ...], tuple[float, ...]]]:
    """Name, ascending places, and means of each series."""
    found: list[tuple[str, tuple[float, ...], tuple[float, ...]]] = []
    for name in dict.fromkeys(by.series):
        pairs = sorted((x, y) for x, y, own in zip(by.places, means, by.series, strict=True) if own == name)
        found.append((name, tuple(x for x, _ in pairs), tuple(y for _, y in pairs)))
    return found


def _numbers_axis(places: Sequence[float]) -> dict[str, Any]:
    """An axis with ticks at `places` alone."""
    ticks = sorted(set(places))
    axis: dict[str, Any] = {"tickvals": ticks, "ticktext": [f"{x:g}" for x in ticks]}
    if _is_logarithmic(places):
        return axis | {"type": "log", "range": list(limits([math.log10(x) for x in places]))}
    return axis | {"range": list(limits(places))}


def _is_logarithmic(places: Sequence[float]) -> bool:
    """Return whether `places` spread over more than a decade, as learning rates do."""
    return min(places) > 0 and max(places) > 10 * min(places)


def _values(group: Group, figure: Figure) -> list[float]:
    return [run.figures[figure.name] for run in group.runs if figure.name in run.figures]


# Charts of the course of training.


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
    """The mean of `curves` as far as all of them go."""
    shortest = min(curves, key=lambda c: c.x[-1])
    values = [np.interp(shortest.x, c.x, c.y) for c in curves]  # thinned curves of other lengths have other steps
    return shortest._replace(raw=[], y=np.mean(values, axis=0).tolist())


def _other_objectives(comparison: Comparison) -> bool:
    """Return whether the runs minimised different objectives, so that their losses cannot be compared."""
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
