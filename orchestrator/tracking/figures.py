"""Figures of a report that are not to be read without looking at others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def recovered(report: Mapping[str, Any]) -> float | None:
    """Share of the gap from baseline to teacher that the student has closed; None where the baseline is as good as the teacher.

    `gap_recovered` of report.json is the plain ratio, which says nothing there.
    """
    baseline, teacher = ((report.get(model) or {}).get("heldout_ce_nats") for model in ("baseline", "teacher"))
    return report.get("gap_recovered") if baseline is not None and teacher is not None and baseline > teacher else None
