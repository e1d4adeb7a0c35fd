"""Building blocks of all charts: plain plotly figures, the lines in them, and tables that give the same in numbers.

Colours are written as `$name` and filled in by the page from its CSS variables, so that one figure serves light, dark
and print. A model keeps its colour everywhere: teacher grey, student blue, baseline orange.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

Figure = dict[str, Any]

MODELS = ("teacher", "student", "baseline")
_MAX_POINTS = 600
_LABEL_GAP_PX = 17
_WIDE = {"l": 62, "r": 132, "t": 12, "b": 44}
"""Margins with room for the names at the ends of lines."""
_NARROW = {"l": 54, "r": 12, "t": 30, "b": 44}


class Chart(NamedTuple):
    """A figure, and the numbers in it as a table for who cannot see it."""

    figure: Figure
    head: list[str]
    rows: list[list[str]]


class Curve(NamedTuple):
    """One labelled line: its raw values and the smoothed ones that are drawn strongly."""

    label: str
    color: str
    dash: str
    x: list[float]
    raw: list[float]
    y: list[float]


def curve(
    points: Sequence[dict[str, Any]],
    stage: str,
    metric: str,
    label: str,
    color: str,
    dash: str = "solid",
    by: str = "step",
) -> Curve | None:
    """One metric of one stage by step or time; of a step that was logged twice the last point counts."""
    last = {p["step"]: p for p in points if p["stage"] == stage and _is_number(p["metrics"].get(metric))}
    if not last:
        return None
    pairs = sorted((p[by], p["metrics"][metric]) for p in last.values())
    x, raw = _thinned([float(a) for a, _ in pairs]), _thinned([float(b) for _, b in pairs])
    return Curve(label, color, dash, x, raw, smoothed(raw))


def smoothed(values: list[float]) -> list[float]:
    """Moving mean over some 4 % of the values; centred, but at the end, where curves are flat, over the past alone.

    At the start, where curves are steep, the window shrinks to both sides instead.
    """
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    means: list[float] = []
    for i in range(len(values)):
        back = min(len(values) // 50, i)
        ahead = min(back, len(values) - 1 - i)
        means.append((sums[i + ahead + 1] - sums[i - back]) / (back + ahead + 1))
    return means


def limits(values: Sequence[float]) -> tuple[float, float]:
    """An axis range with a little air around `values`."""
    low, high = min(values), max(values)
    air = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - air, high + air


def frame(height: int, narrow: bool = False) -> dict[str, Any]:
    """The layout that all figures share; `narrow` for half of the page's width."""
    return {
        "height": height,
        "margin": _NARROW if narrow else _WIDE,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "$font", "size": 13, "color": "$muted"},
        "hovermode": "x unified",
        "hoverlabel": {"bgcolor": "$surface", "bordercolor": "$line", "font": {"color": "$text"}},
        "showlegend": narrow,
        "legend": {"orientation": "h", "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom", "itemclick": False},
        "barmode": "overlay",
        "bargap": 0,
    }


def lines(
    curves: Sequence[Curve], height: int, domain: list[float], unit: str, raw: bool = True, floor: float | None = None
) -> Figure:
    """A figure of labelled lines whose y axis spans `domain` of the plot's height."""
    low, high = limits([v for c in curves for v in (c.raw if raw and c.raw else c.y)] or [0.0, 1.0])
    low = low if floor is None else floor
    faint = [drawn(c, faint=True) for c in curves if raw and c.raw != c.y and c.raw]
    first, last = min((c.x[0] for c in curves), default=0.0), max((c.x[-1] for c in curves), default=1.0)
    layout = frame(height) | {
        "xaxis": plain_axis() | {"showgrid": False, "range": [first, last if last > first else first + 1]},
        "yaxis": plain_axis() | {"domain": domain, "range": [low, high], "title": axis_title(unit)},
        "annotations": end_labels(curves, low, high, (domain[1] - domain[0]) * (height - 56), "y"),
    }
    return {"data": faint + [drawn(c) for c in curves], "layout": layout}


def plain_axis() -> dict[str, Any]:
    return {"gridcolor": "$line", "linecolor": "$line", "zeroline": False, "ticks": "", "automargin": False}


def axis_title(text: str) -> dict[str, Any]:
    return {"text": text, "standoff": 10, "font": {"size": 12, "color": "$muted"}}


def drawn(curve: Curve, faint: bool = False, axis: str = "y") -> dict[str, Any]:
    """The smoothed line, or faintly behind it the raw one."""
    dots = len(curve.x) == 1
    shape = {"color": curve.color, "dash": "solid" if faint else curve.dash, "width": 1 if faint else 2.25}
    trace = {"type": "scatter", "mode": "markers" if dots else "lines", "name": curve.label, "x": curve.x, "yaxis": axis}
    trace |= {"line": shape, "marker": {"color": curve.color}, "y": curve.raw if faint else curve.y}
    return trace | ({"opacity": 0.28, "hoverinfo": "skip", "showlegend": False} if faint else {"hovertemplate": "%{y:.4~g}"})


def end_labels(curves: Sequence[Curve], low: float, high: float, height_px: float, axis: str) -> list[dict[str, Any]]:
    """Each line's name at the right margin, as high as its end, pushed apart where ends lie too close to be read.

    At the margin and not where the line ends: another line may go on there.
    """
    ordered = sorted(curves, key=lambda c: c.y[-1])
    ends_px = [(c.y[-1] - low) / (high - low) * height_px for c in ordered]
    return [
        {"x": 1, "xref": "paper", "y": curve.y[-1], "yref": axis, "text": curve.label, "showarrow": False}
        | {"xanchor": "left", "xshift": 6, "yshift": place - end}
        | {"font": {"color": curve.color, "size": 13}}
        for curve, end, place in zip(ordered, ends_px, _apart(ends_px, height_px), strict=True)
    ]


def _apart(places: Sequence[float], top: float) -> list[float]:
    """Ascending `places`, moved up until they are `_LABEL_GAP_PX` apart, and down again from `top` where they passed it."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + _LABEL_GAP_PX) if moved else place)
    return [min(place, top - _LABEL_GAP_PX * above) for place, above in zip(moved, range(len(moved) - 1, -1, -1), strict=True)]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _thinned(values: list[float]) -> list[float]:
    """At most `_MAX_POINTS` values: the means of equal buckets."""
    size = math.ceil(len(values) / _MAX_POINTS)
    return [sum(b) / len(b) for i in range(0, len(values), size) if (b := values[i : i + size])]
