"""Models that are broken, but whose numbers are finite: measured like any other, and said to be what they are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.evaluate.measure import Subject, _answers, _measured, perplexity
from orchestrator.evaluate.tokens import kl_histogram
from orchestrator.models.build import load_model
from orchestrator.report.build import write_report
from tests.field import cases
from tests.reports import small_points, small_report


def test_perplexity_has_no_upper_end() -> None:
    assert perplexity(1.0) == math.e
    assert perplexity(1e28) == math.inf


def test_a_broken_teacher_is_measured(tmp_path: Path) -> None:
    """huge-row: the evaluation ended in an `OverflowError`; now its perplexity is infinite and the other figures are there."""
    teacher, student = cases.huge_row(tmp_path / "huge"), cases.save_model(tmp_path / "base", seed=1)
    models: Any = {
        "teacher": load_model(teacher, "fp32", torch.device("cpu")),
        "student": load_model(student, "fp32", torch.device("cpu")),
    }
    ids = torch.randint(1, 299, (4, 33), generator=torch.Generator().manual_seed(0))
    ids[:, 5] = 300  # the token whose row is huge
    heldout: Any = SimpleNamespace(
        windows=lambda: (ids, torch.ones_like(ids[:, 1:], dtype=torch.bool), [bytes([i]) for i in range(len(ids))])
    )
    subjects = {name: Subject(str(folder), "fp32") for name, folder in (("teacher", teacher), ("student", student))}
    measured = _measured(heldout, subjects, 4, models, {name: _answers(model) for name, model in models.items()})
    assert measured.figures["teacher"]["heldout_ppl"] == math.inf
    ce = measured.figures["student"]["heldout_ce_nats"]
    assert measured.figures["student"]["heldout_ppl"] == pytest.approx(math.exp(ce)), "the student is as sound as ever"
    finite = {name: value for name, value in measured.figures["teacher"].items() if math.isfinite(value)}
    assert {"heldout_ce_nats", "top1_accuracy", "ece", "params", "tokens_per_s"} <= set(finite)


def test_divergences_without_an_end_are_counted() -> None:
    kl = np.array([0.1, 1.0, np.inf])
    counted = kl_histogram({"student": kl, "baseline": np.array([np.inf] * 3)})
    assert sum(counted["student"]) == sum(counted["baseline"]) == 3
    assert all(math.isfinite(edge) for edge in counted["edges_nats"])


def test_an_infinite_perplexity_is_said(tmp_path: Path) -> None:
    """JSON has null for it, which the summary and the page show as what it is."""
    report = small_report()
    report["teacher"] |= {"heldout_ce_nats": 2.5e28, "heldout_ppl": math.inf}
    data, page, summary = (path.read_text() for path in write_report(tmp_path, report, small_points(), [], "name: x\n"))
    assert json.loads(data)["teacher"]["heldout_ppl"] is None
    assert "| ∞ |" in summary and "∞" in page
