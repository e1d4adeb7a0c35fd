"""Cross entropy and losses by step."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from orchestrator.report.charts.figure import (
    MODELS,
    Chart,
    Curve,
    axis_title,
    curve,
    drawn,
    end_labels,
    frame,
    limits,
    lines,
    plain_axis,
    smoothed,
)
from orchestrator.report.words import number
from orchestrator.tracking import names

_DASHES = ("dash", "dot", "dashdot", "longdash")
_TABLE_ROWS = 9
_SMALL = 250


def ce_chart(report: dict[str, Any], points: Sequence[dict[str, Any]]) -> Chart | None:
    """Hard-label cross entropy by step; below it student minus baseline on the same rows, which cancels their noise."""
    curves = {m: curve(points, m, names.CE_NATS, m, f"${m}") for m in MODELS}
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
    figure = lines(shown, height, split, "nats per token")
    figure["layout"]["xaxis"] |= {"title": axis_title("step"), "anchor": "y2" if difference else "y"}
    if difference:
        low, high = limits([*difference.y, 0.0])
        figure["data"].append(drawn(difference, axis="y2"))
        figure["data"].append(
            {"type": "scatter", "mode": "lines", "x": [first, last], "y": [0, 0], "yaxis": "y2", "hoverinfo": "skip"}
            | {"line": {"color": "$baseline", "width": 1.5}, "showlegend": False}
        )
        figure["layout"]["yaxis2"] = plain_axis() | {"domain": [0.0, 0.24], "range": [low, high], "nticks": 4}
        figure["layout"]["yaxis2"]["title"] = axis_title("difference")
        figure["layout"]["annotations"] += end_labels([difference], low, high, 0.24 * (height - 56), "y2")
    return Chart(figure, *_table(trained))


def loss_chart(points: Sequence[dict[str, Any]]) -> Chart | None:
    """The student's training loss and the terms it is mixed from."""
    terms = {
        k for p in points if p["stage"] == "student" for k in p["metrics"] if k.startswith("train/") and k.endswith("_nats")
    }
    total = curve(points, "student", names.LOSS, "total loss", "$student")
    parts = [
        curve(points, "student", name, _term(name), "$student", _DASHES[i % len(_DASHES)])
        for i, name in enumerate(sorted(terms))
    ]
    curves = [c for c in (*parts, total) if c]
    if not curves:
        return None
    figure = lines(curves, 340, [0.0, 1.0], "nats per token", raw=False)
    figure["layout"]["xaxis"]["title"] = axis_title("step")
    return Chart(figure, *_table(curves))


def small_chart(
    points: Sequence[dict[str, Any]], metric: str, models: Sequence[str], digits: int, dots: bool = False
) -> Chart | None:
    """One metric of `models` by step, for half of the page's width; with `dots` where it was measured."""
    curves = [c for m in models if (c := curve(points, m, metric, m, f"${m}"))]
    if not curves:
        return None
    layout = frame(_SMALL, narrow=True)
    layout["xaxis"] = plain_axis() | {"showgrid": False, "title": axis_title("step")}
    layout["yaxis"] = plain_axis() | {"exponentformat": "power", "nticks": 5}
    data = [drawn(c) | ({"mode": "lines+markers"} if dots else {}) for c in curves]
    if not dots:
        data = [drawn(c, faint=True) for c in curves if c.raw != c.y] + data
    return Chart({"data": data, "layout": layout}, *_table(curves, digits))


def _table(curves: Sequence[Curve], digits: int = 4) -> tuple[list[str], list[list[str]]]:
    """Smoothed values at a few steps of the longest of `curves`, evenly chosen."""
    steps = max((c.x for c in curves), key=len)
    chosen = sorted({i * (len(steps) - 1) // (_TABLE_ROWS - 1) for i in range(_TABLE_ROWS)})
    values = [dict(zip(c.x, c.y, strict=True)) for c in curves]
    rows = [[f"{steps[i]:.0f}", *(number(v.get(steps[i]), digits) for v in values)] for i in chosen]
    return ["step", *(c.label for c in curves)], rows


def _difference(student: Curve | None, baseline: Curve | None) -> Curve | None:
    """Student minus baseline at the steps both have, or None."""
    if student is None or baseline is None:
        return None
    other = dict(zip(baseline.x, baseline.raw, strict=True))
    pairs = [(x, y - other[x]) for x, y in zip(student.x, student.raw, strict=True) if x in other]
    if len(pairs) < 2:
        return None
    raw = [d for _, d in pairs]
    return Curve("student − baseline", "$student", "solid", [x for x, _ in pairs], raw, smoothed(raw))


def _term(metric: str) -> str:
    name = metric.removeprefix("train/").removesuffix("_nats")
    return {"ce": "cross entropy", "kd": "distillation"}.get(name, html.escape(name.replace("_", " "), quote=False))
