"""Charts of how student and baseline differ from the teacher on held-out tokens."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from orchestrator.report.charts.figure import MODELS, Chart, axis_title, frame, plain_axis
from orchestrator.report.words import count, nats, number, percent

_HEIGHT = 320


def kl_chart(heldout: dict[str, Any]) -> Chart:
    """Tokens by KL to the teacher: the student's as bars, the baseline's as an outline."""
    histogram = heldout["kl_histogram"]
    shown = [m for m in MODELS if m in histogram]
    edges = histogram["edges_nats"]
    places = list(range(len(edges) - 1))
    ranges = [f"{nats(a)} to {nats(b)}" for a, b in pairwise(edges)]
    figure: dict[str, Any] = {"data": [], "layout": frame(_HEIGHT, narrow=True)}
    for model in shown:
        trace = {"name": model, "x": places, "y": histogram[model], "hovertemplate": "%{y:,} tokens"}
        if model == "student":
            trace |= {"type": "bar", "width": 0.92, "marker": {"color": "$student", "line": {"width": 0}}}
        else:
            trace |= {"type": "scatter", "mode": "lines", "line": {"shape": "hvh", "color": f"${model}", "width": 2.25}}
        figure["data"].append(trace)
    decades = [(i, e) for i, e in enumerate(edges) if e and math.isclose(math.log10(e), round(math.log10(e)), abs_tol=1e-9)]
    figure["layout"] |= {
        "xaxis": plain_axis()
        | {"showgrid": False, "title": axis_title("KL(teacher ‖ model), nats"), "range": [-0.5, len(places) - 0.5]}
        | {"tickvals": [i - 0.5 for i, _ in decades], "ticktext": [f"{e:g}" for _, e in decades], "ticks": "outside"},
        "yaxis": plain_axis() | {"title": axis_title("tokens"), "tickformat": "~s", "rangemode": "tozero"},
    }
    rows = [[r, *(count(histogram[m][i]) for m in shown)] for i, r in enumerate(ranges)]
    return Chart(figure, ["KL in nats", *(f"{m}, tokens" for m in shown)], rows)


def agreement_chart(heldout: dict[str, Any]) -> Chart:
    """Share of tokens on whose most likely id model and teacher agree, by the teacher's entropy."""
    bins = heldout["by_teacher_entropy"]
    shown = [m for m in MODELS if m in bins]
    figure: dict[str, Any] = {"data": [], "layout": frame(_HEIGHT, narrow=True)}
    for model in shown:
        figure["data"].append(
            {"type": "scatter", "mode": "lines+markers", "name": model, "x": bins["entropy_nats"]}
            | {"y": bins[model]["top1_agreement"], "hovertemplate": "%{y:.1%}"}
            | {"line": {"color": f"${model}", "width": 2.25}, "marker": {"color": f"${model}", "size": 7}}
        )
    figure["layout"] |= {
        "xaxis": plain_axis() | {"showgrid": False, "title": axis_title("teacher's entropy, nats"), "hoverformat": ".2f"},
        "yaxis": plain_axis() | {"title": axis_title("same top-1 token"), "range": [0, 1.02], "tickformat": ".0%"},
    }
    rows = [
        [number(entropy, 2), count(bins["tokens"][i])]
        + [cell for m in shown for cell in (percent(bins[m]["top1_agreement"][i]), nats(bins[m]["kl_to_teacher_nats"][i]))]
        for i, entropy in enumerate(bins["entropy_nats"])
    ]
    head = ["teacher's entropy, nats", "tokens"]
    return Chart(figure, head + [f"{m}{what}" for m in shown for what in (" agrees", ", mean KL in nats")], rows)
