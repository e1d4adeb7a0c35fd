"""The report's charts, computed from a run's metric points and what was measured on held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orchestrator.report.charts.agreement import agreement_chart, kl_chart
from orchestrator.report.charts.figure import Chart
from orchestrator.report.charts.timeline import timeline_chart
from orchestrator.report.charts.training import ce_chart, loss_chart, small_chart
from orchestrator.tracking import names

_TRAINED = ("baseline", "student")


def charts(report: dict[str, Any], points: Sequence[dict[str, Any]]) -> dict[str, Chart]:
    """All charts that the run has data for, by name."""
    heldout = report.get("heldout")
    found = {
        "ce": ce_chart(report, points),
        "loss": loss_chart(points),
        "heldout_ce": small_chart(points, names.HELDOUT_CE_NATS, _TRAINED, 4, dots=True),
        "heldout_kl": small_chart(points, names.HELDOUT_KL_NATS, _TRAINED, 4, dots=True),
        "learning_rate": small_chart(points, names.LEARNING_RATE, ("student",), 6),
        "grad_norm": small_chart(points, names.GRAD_NORM, _TRAINED, 3),
        "kl": kl_chart(heldout) if heldout else None,
        "agreement": agreement_chart(heldout) if heldout else None,
        "timeline": timeline_chart(report, points),
    }
    return {name: chart for name, chart in found.items() if chart}
