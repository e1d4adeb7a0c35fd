"""Chart of the throughput of both sides, and under it, on the same axis, of how every stage spent its time."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import numpy as np

from orchestrator.report.charts.figure import Chart, Figure, axis_title, curve, lines, plain_axis
from orchestrator.report.timeline import Lane, Span, lanes
from orchestrator.report.words import NOTHING, seconds
from orchestrator.tracking import names

_RATES = (
    ("labels", names.LABEL_TOKENS_PER_S, "teacher labels", "$teacher"),
    ("student", names.TRAIN_TOKENS_PER_S, "student trains", "$student"),
    ("baseline", names.TRAIN_TOKENS_PER_S, "baseline trains", "$baseline"),
)
_STAGE_COLORS = {"teacher": "$teacher", "labels": "$teacher", "student": "$student", "baseline": "$baseline"}
_ROW_PX = 32
_THICK = 0.62
"""Thickness of a bar, as a share of a row's height."""
_BINS = 300
"""Across the figure: about two pixels each in print."""


def timeline_chart(report: dict[str, Any], points: Sequence[dict[str, Any]]) -> Chart | None:
    """Tokens per second of both sides, and the time of the stages; of teacher and students split by what they did with it.

    Points of a reused stage are left out: their times count from the start of an earlier run.
    """
    stages = report.get("stages") or []
    reused = {s["stage"] for s in stages if s["status"] == "reused"}
    points = [p for p in points if p["stage"] not in reused]
    end = max([0.0, *(s["started_s"] + s["seconds"] for s in stages), *(p["time_s"] for p in points)])
    unit, per_unit = ("s", 1) if end < 180 else ("min", 60) if end < 3 * 3600 else ("h", 3600)
    curves = [c for r in _RATES if (c := curve(points, *r, by="time_s"))]
    curves = [c._replace(x=[x / per_unit for x in c.x]) for c in curves]
    if not curves and not any(s["status"] == "ran" for s in stages):
        return None
    strips_px = _ROW_PX * len(stages)
    height = 56 + strips_px + (240 if curves else 0)
    top = strips_px / (height - 56)
    if curves:
        figure = lines(curves, height, [min(top + 0.09, 0.9), 1.0], "tokens per second", floor=0.0)
        figure["layout"]["yaxis"]["tickformat"] = "~s"
    else:
        figure = lines([], height, [0.99, 1.0], "")
        figure["layout"]["yaxis"]["visible"] = False
    figure["layout"]["xaxis"] |= {"title": axis_title(f"time since the run started, {unit}"), "anchor": "y2"}
    figure["layout"]["xaxis"]["range"] = [0, (end or 1.0) / per_unit]
    found = lanes(stages, points)
    if stages:
        _add_rows(figure, stages, per_unit, top)
        for lane in found:
            row = next(i for i, s in enumerate(stages) if s["stage"] == lane.stage)
            figure["data"] += _lane(lane, row, per_unit, end / _BINS)
        figure["data"] += _faults(report, per_unit)
    else:
        figure["layout"]["xaxis"]["anchor"] = "y"
    return Chart(figure, *_table(stages, found))


def _add_rows(figure: Figure, stages: Sequence[dict[str, Any]], per_unit: float, top: float) -> None:
    """Add one bar per stage to `figure`, in the lower part up to the paper height `top`."""
    rows = list(range(len(stages)))
    took = [s["seconds"] if s["status"] != "reused" else 0.0 for s in stages]
    words = [seconds(s["seconds"]) if s["status"] != "reused" else "reused" for s in stages]
    figure["data"].append(
        _bar("stages", "$neutral", hoverinfo="skip")
        | {"orientation": "h", "y": rows, "width": _THICK, "base": [s["started_s"] / per_unit for s in stages]}
        | {"x": [t / per_unit for t in took]}
        | {"marker": {"color": [_STAGE_COLORS.get(s["stage"], "$neutral") for s in stages], "line": {"width": 0}}}
    )
    figure["layout"]["yaxis2"] = plain_axis() | {
        "domain": [0.0, top if top < 0.95 else 1.0],
        "range": [len(stages) - 0.4, -0.75],
        "tickvals": rows,
        "ticktext": [html.escape(s["stage"], quote=False) for s in stages],
        "showgrid": False,
        "fixedrange": True,
    }
    figure["layout"]["annotations"] += [
        {"x": (s["started_s"] + t) / per_unit, "y": row, "yref": "y2", "text": text}
        | {"xanchor": "left", "xshift": 5, "showarrow": False, "font": {"color": "$muted", "size": 12}}
        for row, s, t, text in zip(rows, stages, took, words, strict=True)
    ]


def _lane(lane: Lane, row: int, per_unit: float, bin_s: float) -> list[dict[str, Any]]:
    """Return the bars that cover the stage's: start-up hatched, then per bin the busy share, and on it the waiting share."""
    across = {"orientation": "h", "y": [row], "width": _THICK}
    ends = [lane.began_s, lane.spans[0].start_s, lane.ended_s]
    hatch = {"shape": "/", "fgcolor": "$neutral", "bgcolor": "$page", "size": 6, "solidity": 0.25}
    startup = _bar(f"{lane.stage} starts up", "$page", hoverinfo="skip") | across
    startup |= {"base": [ends[0] / per_unit], "x": [(ends[1] - ends[0]) / per_unit]}
    startup["marker"] |= {"pattern": hatch, "line": {"width": 1, "color": "$neutral"}}
    rest = _bar(f"{lane.stage} else", "$idle", hoverinfo="skip") | across
    rest |= {"base": [ends[1] / per_unit], "x": [(ends[2] - ends[1]) / per_unit]}
    edges, busy, waiting = binned(lane.spans, bin_s)
    foot = row + _THICK / 2
    upright = {"x": [e / per_unit for e in edges[:-1]], "offset": 0, "width": np.diff(edges / per_unit).tolist()}
    parts = (("busy", _STAGE_COLORS[lane.stage], busy, np.zeros_like(busy)), ("waiting", "$wait", waiting, busy))
    return [
        startup,
        rest,
        *(
            _bar(f"{lane.stage} {what}", color, hovertemplate=f"{lane.stage} {what} %{{customdata:.0%}}<extra></extra>")
            | upright
            | {"y": (-_THICK * share).tolist(), "base": (foot - _THICK * below).tolist(), "customdata": share.tolist()}
            for what, color, share, below in parts
        ),
    ]


def binned(spans: Sequence[Span], bin_s: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges [bins + 1] of equal bins, the last perhaps shorter, over `spans`; shares [bins] that were busy and waiting."""
    first, last = spans[0].start_s, max(spans[-1].end_s, spans[0].start_s + bin_s)
    edges = np.append(np.arange(first, last - bin_s / 2, bin_s), last)
    times = np.array([t for s in spans for t in (s.start_s, s.end_s)])

    def seconds_in_bins(amounts: list[float]) -> np.ndarray:
        after = np.cumsum(amounts)
        return np.diff(np.interp(edges, times, np.stack([after - amounts, after], 1).ravel()))

    busy, waiting, idle = (seconds_in_bins([getattr(s, f"{kind}_s") for s in spans]) for kind in ("busy", "waiting", "idle"))
    whole = np.maximum(busy + waiting + idle, np.diff(edges))
    return edges, busy / whole, waiting / whole


def _bar(name: str, color: str, **hover: str) -> dict[str, Any]:
    return {
        "type": "bar",
        "name": name,
        "yaxis": "y2",
        "showlegend": False,
        "marker": {"color": color, "line": {"width": 0}},
        **hover,
    }


def _faults(report: dict[str, Any], per_unit: float) -> list[dict[str, Any]]:
    """A mark above the rows for every fault of the last attempt, which is the one that the figure shows."""
    shown = [f for f in report.get("faults") or [] if f["attempt"] == report["attempt"]]
    if not shown:
        return []
    marks = {
        "type": "scatter",
        "mode": "markers",
        "name": "faults",
        "showlegend": False,
        "yaxis": "y2",
        "y": [-0.6] * len(shown),
    }
    marks |= {"x": [f["time_s"] / per_unit for f in shown], "text": [html.escape(f["text"]) for f in shown]}
    return [marks | {"marker": {"color": "$bad", "symbol": "x", "size": 9}, "hovertemplate": "%{text}<extra></extra>"}]


def _table(stages: Sequence[dict[str, Any]], found: Sequence[Lane]) -> tuple[list[str], list[list[str]]]:
    figures = {lane.stage: lane.figures() for lane in found}
    kinds = ("startup_s", "busy_s", "waiting_s", "idle_s")
    rows = [
        [s["stage"], seconds(s["started_s"]), s["status"] if s["status"] == "reused" else seconds(s["seconds"])]
        + [seconds(figures[s["stage"]][k]) if s["stage"] in figures else NOTHING for k in kinds]
        for s in stages
    ]
    return ["stage", "began after", "took", "starting up", "busy", "waiting", "idle"], rows
