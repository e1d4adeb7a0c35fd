"""Models that are broken, but whose numbers are finite: measured like any other, and said to be what they are."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.evaluate.figures import perplexity
from orchestrator.evaluate.model import AnsweringTeacher, Subject
from orchestrator.evaluate.tokens import kl_histogram
from orchestrator.store.local import LocalStore
from orchestrator.teacher.backend import Replica, TransformersBackend
from tests.answers import Here, answer, heldout_of
from tests.field import cases
from tests.reports import small_points, small_report, write_report


def test_perplexity_has_no_upper_end() -> None:
    assert perplexity(1.0) == math.e
    assert perplexity(1e28) == math.inf


def test_a_broken_teacher_is_measured(tmp_path: Path) -> None:
    """huge-row: the evaluation ended in an `OverflowError`; now its perplexity is infinite and the other figures are there."""
    teacher, student = cases.huge_row(tmp_path / "huge"), cases.save_model(tmp_path / "base", seed=1)
    ids = torch.randint(1, 299, (4, 33), generator=torch.Generator().manual_seed(0))
    ids[:, 5] = 300  # the token whose row is huge
    heldout = heldout_of(LocalStore(tmp_path / "store"), ids, None, student)
    answer(heldout, TransformersBackend(Replica(str(teacher), "fp32")), vocab_size=cases.VOCAB)
    answering = AnsweringTeacher(str(teacher), "fp32", cases.VOCAB)
    figures = Here(4).teacher(heldout, answering).figures
    assert figures["heldout_ppl"] == math.inf
    finite = {name: value for name, value in figures.items() if math.isfinite(value)}
    assert {"heldout_ce_nats", "top1_accuracy", "ece", "params", "tokens_per_s"} <= set(finite)
    figures = Here(4).model("student", Subject(str(student), "fp32"), heldout, answering).figures
    assert figures["heldout_ppl"] == pytest.approx(math.exp(figures["heldout_ce_nats"])), "the student is as sound as ever"


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
