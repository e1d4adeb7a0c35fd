"""The page of a comparison: one HTML file that needs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orchestrator.compare.charts import COLORS, charts, color, is_dashed
from orchestrator.compare.figures import FIGURES, Figure
from orchestrator.compare.groups import Comparison, Group, Interval, finding, shown_value
from orchestrator.compare.read import RunRecord
from orchestrator.report.page import plotly_script, script_json, templates
from orchestrator.report.words import NOTHING
from orchestrator.store.local import LocalStore

_MAX_NOTED = 3
"""Differences that are named beside a run; more would hide its name."""
_COURSES = (
    ("heldout", "Held-out cross entropy by step", "On the same few held-out rows while the students train; lower is better."),
    (
        "ce",
        "Cross entropy on training rows by step",
        "Moving means of the hard-label cross entropy; the axis is made for what comes after the first quarter of the steps.",
    ),
    ("loss", "What was minimised, by step", "Moving means of the total loss, which is the same mixture in all of these runs."),
)


def write_page(comparison: Comparison, path: Path) -> Path:
    """Write the page to `path`, whole or not at all. Raises `EnvironmentFault` where that cannot be written."""
    path = path.expanduser().absolute()
    LocalStore(path.parent).replace(path.name, page(comparison).encode())
    return path


def page(comparison: Comparison) -> str:
    """The page's HTML."""
    drawn = charts(comparison)
    groups = [{"label": group.label, "color": _style(i)} for i, group in enumerate(comparison.groups)]
    return (
        templates(Path(__file__).parent)
        .get_template("page.html.j2")
        .render(
            page_title=f"{', '.join(run.name for run in comparison.runs)} – compared",
            finding=finding(comparison),
            cautions=comparison.cautions,
            heads=[figure.title for figure in FIGURES],
            runs=[_run_row(comparison, run) for run in comparison.runs],
            repeated=comparison.repeated,
            groups=groups,
            group_rows=[_group_row(comparison, i, group) for i, group in enumerate(comparison.groups)],
            differs=[{"key": key, "shown": [shown_value(v) for v in values]} for key, values in comparison.differs.items()],
            few_differences=len(comparison.differs) <= _MAX_NOTED,
            interval_note="; bars are 95 % intervals over seeds" if comparison.repeated else "",
            courses=_COURSES,
            charts=drawn,
            colors=COLORS,
            figures=script_json({name: chart.figure for name, chart in drawn.items()}),
            plotly=plotly_script() if drawn else "",
        )
    )


def _run_row(comparison: Comparison, run: RunRecord) -> dict[str, Any]:
    index = comparison.runs.index(run)
    own = {key: values[index] for key, values in comparison.differs.items()}
    noted = [f"{key.rpartition('.')[2]} {shown_value(value)}" for key, value in own.items()] if len(own) <= _MAX_NOTED else []
    if not run.finished:
        noted.append(f"not finished: {run.status}")
    cells = [
        {"text": figure.shown(run.figures.get(figure.name)), "best": run.name in comparison.best_runs(figure), "note": ""}
        for figure in FIGURES
    ]
    row = {"name": run.name, "note": " · ".join(noted), "cells": cells, "address": run.address, "job_yaml": run.job_yaml}
    return row | {"color": _style(comparison.groups.index(comparison.group_of(run)))}


def _group_row(comparison: Comparison, index: int, group: Group) -> dict[str, Any]:
    cells = [
        _interval(figure, group.figure(figure.name), group.label in comparison.best_groups(figure), len(group.runs))
        for figure in FIGURES
    ]
    noted = f"{len(group.runs)} run{'s' if len(group.runs) > 1 else ''}"
    return {"name": group.label, "note": noted, "cells": cells, "color": _style(index)}


def _interval(figure: Figure, found: Interval | None, best: bool, runs: int) -> dict[str, Any]:
    if found is None:
        return {"text": NOTHING, "best": False, "note": ""}
    parts = [f"± {figure.shown(found.half)}"] if found.half is not None else []
    parts += [f"of {found.n}"] if found.n < runs else []
    return {"text": figure.shown(found.mean), "best": best, "note": " ".join(parts)}


def _style(index: int) -> str:
    """CSS classes of what belongs to group number `index`."""
    return color(index) + (" ring" if is_dashed(index) else "")
