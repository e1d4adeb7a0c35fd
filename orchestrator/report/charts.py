"""The report's charts as plain plotly figures, computed from a run's metric points.

Colours are written as `$name` and filled in by the page from its CSS variables, so that one figure serves light, dark
and print. A model keeps its colour everywhere: teacher grey, student blue, baseline orange.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Figure = dict[str, Any]

MODELS = ("teacher", "student", "baseline")
_CE, _TOTAL, _TRAIN_RATE, _LABEL_RATE = "train/ce_nats", "train/loss", "train/tokens_per_s", "label/tokens_per_s"
_STAGE_COLORS = {"teacher": "$teacher", "labels": "$teacher", "student": "$student", "baseline": "$baseline"}
_DASHES = ("dash", "dot", "dashdot", "longdash")
_MAX_POINTS = 600
_LABEL_GAP_PX = 17
_MARGIN = {"l": 62, "r": 132, "t": 12, "b": 44}


class Curve(NamedTuple):
    """One labelled line: its raw values and the smoothed ones that are drawn strongly."""

    label: str
    color: str
    dash: str
    x: list[float]
    raw: list[float]
    y: list[float]


def charts(report: dict[str, Any], points: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    """All figures that the run has data for, by name: `ce`, `loss`, `throughput`."""
    found = {
        "ce": _ce_figure(report, points),
        "loss": _loss_figure(points),
        "throughput": _throughput_figure(report.get("stages") or [], points),
    }
    return {name: figure for name, figure in found.items() if figure}


def duration(seconds: float) -> str:
    """`seconds` in words fit for a label: `0.4 s`, `42 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _ce_figure(report: dict[str, Any], points: Sequence[dict[str, Any]]) -> Figure | None:
    """Hard-label cross entropy by step; below it student minus baseline on the same rows, which cancels their noise."""
    curves = {m: _curve(points, m, _CE, m, f"${m}") for m in MODELS}
    trained = [c for m in ("student", "baseline") if (c := curves[m])]
    if not trained:
        return None
    first, last = min(c.x[0] for c in trained), max(c.x[-1] for c in trained)
    teacher, teacher_ce = curves["teacher"], (report.get("teacher") or {}).get("heldout_ce_nats")
    if (teacher is None or teacher.x[-1] > 2 * last) and teacher_ce is not None:
        teacher = Curve("teacher, held out", "$teacher", "dot", [first, last], [], [teacher_ce] * 2)
    shown = ([teacher] if teacher else []) + trained[::-1]
    difference = _difference(curves["student"], curves["baseline"])
    height = 470 if difference else 340
    split = [0.34, 1.0] if difference else [0.0, 1.0]
    figure = _lines(shown, height, split, "nats per token")
    figure["layout"]["xaxis"] |= {"title": _title("step"), "anchor": "y2" if difference else "y"}
    if difference:
        low, high = _limits([*difference.y, 0.0])
        figure["data"].append(_trace(difference, axis="y2"))
        figure["data"].append(
            {"type": "scatter", "mode": "lines", "x": [first, last], "y": [0, 0], "yaxis": "y2", "hoverinfo": "skip"}
            | {"line": {"color": "$baseline", "width": 1.5}, "showlegend": False}
        )
        figure["layout"]["yaxis2"] = _axis() | {"domain": [0.0, 0.24], "range": [low, high], "nticks": 4}
        figure["layout"]["yaxis2"]["title"] = _title("difference")
        figure["layout"]["annotations"] += _end_labels([difference], low, high, 0.24 * (height - 56), "y2")
    return figure


def _loss_figure(points: Sequence[dict[str, Any]]) -> Figure | None:
    """The student's training loss and the terms it is mixed from."""
    names = {
        k for p in points if p["stage"] == "student" for k in p["metrics"] if k.startswith("train/") and k.endswith("_nats")
    }
    total = _curve(points, "student", _TOTAL, "total loss", "$student")
    terms = [
        _curve(points, "student", name, _term(name), "$student", _DASHES[i % len(_DASHES)])
        for i, name in enumerate(sorted(names))
    ]
    curves = [c for c in (*terms, total) if c]
    if not curves:
        return None
    figure = _lines(curves, 340, [0.0, 1.0], "nats per token", raw=False)
    figure["layout"]["xaxis"]["title"] = _title("step")
    return figure


def _throughput_figure(stages: Sequence[dict[str, Any]], points: Sequence[dict[str, Any]]) -> Figure | None:
    """Tokens per second of both sides over time, and under it on the same axis when each stage ran.

    Points of a reused stage are left out: their times count from the start of an earlier run.
    """
    reused = {s["stage"] for s in stages if s["status"] == "reused"}
    points = [p for p in points if p["stage"] not in reused]
    end = max((s["started_s"] + s["seconds"] for s in stages), default=0.0)
    end = max([end, *(p["time_s"] for p in points)])
    unit, per_unit = ("s", 1) if end < 180 else ("min", 60) if end < 3 * 3600 else ("h", 3600)
    rates = (
        ("labels", _LABEL_RATE, "teacher labels", "$teacher"),
        ("student", _TRAIN_RATE, "student trains", "$student"),
        ("baseline", _TRAIN_RATE, "baseline trains", "$baseline"),
    )
    curves = [c for r in rates if (c := _curve(points, *r, by="time_s"))]
    curves = [c._replace(x=[x / per_unit for x in c.x]) for c in curves]
    bars = [s for s in stages if s["status"] == "ran"]
    if not curves and not bars:
        return None
    gantt_px = 26 * len(stages)
    height = 56 + gantt_px + (240 if curves else 0)
    top = gantt_px / (height - 56)
    if curves:
        figure = _lines(curves, height, [min(top + 0.09, 0.9), 1.0], "tokens per second", floor=0.0)
        figure["layout"]["yaxis"]["tickformat"] = "~s"
    else:
        figure = _lines([], height, [0.99, 1.0], "")
        figure["layout"]["yaxis"]["visible"] = False
    figure["layout"]["xaxis"] |= {"title": _title(f"time since the run started, {unit}"), "anchor": "y2"}
    figure["layout"]["xaxis"]["range"] = [0, (end or 1.0) / per_unit]
    if stages:
        _add_gantt(figure, stages, per_unit, top)
    else:
        figure["layout"]["xaxis"]["anchor"] = "y"
    return figure


def _add_gantt(figure: Figure, stages: Sequence[dict[str, Any]], per_unit: float, top: float) -> None:
    """Add one row per stage to `figure`, in the lower part up to the paper height `top`."""
    rows = list(range(len(stages)))
    ran = [s["status"] == "ran" for s in stages]
    took = [duration(s["seconds"]) if r else "reused" for s, r in zip(stages, ran, strict=True)]
    figure["data"].append(
        {"type": "bar", "orientation": "h", "y": rows, "yaxis": "y2", "width": 0.52, "showlegend": False}
        | {"base": [s["started_s"] / per_unit for s in stages]}
        | {"x": [s["seconds"] / per_unit if r else 0 for s, r in zip(stages, ran, strict=True)]}
        | {"marker": {"color": [_STAGE_COLORS.get(s["stage"], "$neutral") for s in stages], "line": {"width": 0}}}
        | {"hoverinfo": "skip"}
    )
    figure["layout"]["yaxis2"] = _axis() | {
        "domain": [0.0, top if top < 0.95 else 1.0],
        "range": [len(stages) - 0.4, -0.6],
        "tickvals": rows,
        "ticktext": [html.escape(s["stage"], quote=False) for s in stages],
        "showgrid": False,
        "fixedrange": True,
    }
    figure["layout"]["annotations"] += [
        {"x": (s["started_s"] + (s["seconds"] if r else 0)) / per_unit, "y": row, "yref": "y2", "text": text}
        | {"xanchor": "left", "xshift": 5, "showarrow": False, "font": {"color": "$muted", "size": 12}}
        for row, s, r, text in zip(rows, stages, ran, took, strict=True)
    ]


def _curve(
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
    return Curve(label, color, dash, x, raw, _smoothed(raw))


def _difference(student: Curve | None, baseline: Curve | None) -> Curve | None:
    """Student minus baseline at the steps both have, or None."""
    if student is None or baseline is None:
        return None
    other = dict(zip(baseline.x, baseline.raw, strict=True))
    pairs = [(x, y - other[x]) for x, y in zip(student.x, student.raw, strict=True) if x in other]
    if len(pairs) < 2:
        return None
    raw = [d for _, d in pairs]
    return Curve("student − baseline", "$student", "solid", [x for x, _ in pairs], raw, _smoothed(raw))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _thinned(values: list[float]) -> list[float]:
    """At most `_MAX_POINTS` values: the means of equal buckets."""
    size = math.ceil(len(values) / _MAX_POINTS)
    return [sum(b) / len(b) for i in range(0, len(values), size) if (b := values[i : i + size])]


def _smoothed(values: list[float]) -> list[float]:
    """Moving mean over some 4 % of the values; centred, but at the end, where curves are flat, over the past alone.

    At the start, where curves are steep, the window shrinks to both sides instead.
    """
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    means = []
    for i in range(len(values)):
        back = min(len(values) // 50, i)
        ahead = min(back, len(values) - 1 - i)
        means.append((sums[i + ahead + 1] - sums[i - back]) / (back + ahead + 1))
    return means


def _term(metric: str) -> str:
    name = metric.removeprefix("train/").removesuffix("_nats")
    return {"ce": "cross entropy", "kd": "distillation"}.get(name, html.escape(name.replace("_", " "), quote=False))


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """An axis range with a little air around `values`."""
    low, high = min(values), max(values)
    air = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - air, high + air


def _lines(
    curves: Sequence[Curve], height: int, domain: list[float], unit: str, raw: bool = True, floor: float | None = None
) -> Figure:
    """A figure of labelled lines whose y axis spans `domain` of the plot's height."""
    low, high = _limits([v for c in curves for v in (c.raw if raw and c.raw else c.y)] or [0.0, 1.0])
    low = low if floor is None else floor
    faint = [_trace(c, faint=True) for c in curves if raw and c.raw != c.y and c.raw]
    first, last = min((c.x[0] for c in curves), default=0.0), max((c.x[-1] for c in curves), default=1.0)
    layout = {
        "height": height,
        "margin": _MARGIN,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "$font", "size": 13, "color": "$muted"},
        "hovermode": "x unified",
        "hoverlabel": {"bgcolor": "$surface", "bordercolor": "$line", "font": {"color": "$text"}},
        "showlegend": False,
        "bargap": 0,
        "xaxis": _axis() | {"showgrid": False, "range": [first, last if last > first else first + 1]},
        "yaxis": _axis() | {"domain": domain, "range": [low, high], "title": _title(unit)},
        "annotations": _end_labels(curves, low, high, (domain[1] - domain[0]) * (height - 56), "y"),
    }
    return {"data": faint + [_trace(c) for c in curves], "layout": layout}


def _axis() -> dict[str, Any]:
    return {"gridcolor": "$line", "linecolor": "$line", "zeroline": False, "ticks": "", "automargin": False}


def _title(text: str) -> dict[str, Any]:
    return {"text": text, "standoff": 10, "font": {"size": 12, "color": "$muted"}}


def _trace(curve: Curve, faint: bool = False, axis: str = "y") -> dict[str, Any]:
    """The smoothed line, or faintly behind it the raw one."""
    dots = len(curve.x) == 1
    shape = {"color": curve.color, "dash": "solid" if faint else curve.dash, "width": 1 if faint else 2.25}
    trace = {"type": "scatter", "mode": "markers" if dots else "lines", "name": curve.label, "x": curve.x, "yaxis": axis}
    trace |= {"line": shape, "marker": {"color": curve.color}, "y": curve.raw if faint else curve.y}
    return trace | ({"opacity": 0.28, "hoverinfo": "skip"} if faint else {"hovertemplate": "%{y:.4~g}"})


def _end_labels(curves: Sequence[Curve], low: float, high: float, height_px: float, axis: str) -> list[dict[str, Any]]:
    """Each line's name at its end, pushed apart where ends lie too close to be read."""
    to_px: Callable[[float], float] = lambda y: (y - low) / (high - low) * height_px  # noqa: E731
    labels, taken = [], -math.inf
    for curve in sorted(curves, key=lambda c: c.y[-1]):
        place = max(to_px(curve.y[-1]), taken + _LABEL_GAP_PX)
        taken = place
        labels.append(
            {"x": curve.x[-1], "y": curve.y[-1], "yref": axis, "text": curve.label, "showarrow": False}
            | {"xanchor": "left", "xshift": 6, "yshift": place - to_px(curve.y[-1])}
            | {"font": {"color": curve.color, "size": 13}}
        )
    return labels
