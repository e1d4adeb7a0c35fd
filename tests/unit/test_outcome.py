"""The end of a run: figures are kept whatever becomes of the pages that show them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator import outcome
from orchestrator.evaluate.measure import Measured
from orchestrator.report import build
from orchestrator.run.record import Fault
from orchestrator.spec.job import Job
from tests.reports import small_points, small_report


class Run:
    """What the last step needs of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.job, self.started, self.attempt = folder, Job(name="tiny"), 0.0, 1
        self.stages: dict[str, Any] = {}
        self.faults: list[Fault] = []
        self.artifacts: list[str] = []
        self.tracker = SimpleNamespace(artifact=lambda path: self.artifacts.append(path.name))
        self.concluded = ""

    def collect(self) -> None:
        pass

    def points(self) -> list[dict[str, Any]]:
        return small_points()

    def shown_job(self) -> str:
        return "name: tiny\n"

    def warn(self, text: str) -> None:
        self.faults.append(Fault(1, 0.0, text))

    def conclude(self, report: dict[str, Any], verdict: str) -> None:
        self.concluded = verdict

    @contextmanager
    def stage(self, name: str, key: str) -> Iterator[None]:
        yield


@pytest.mark.parametrize("broken", [False, True])
def test_a_page_that_cannot_be_drawn_costs_the_page_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    run: Any = Run(tmp_path)

    def fail(*_: Any) -> None:
        raise KeyError("kl_histogram")

    if broken:
        monkeypatch.setattr(build, "charts", fail)
    outcome.write_report(run, small_report(), Measured({}, {}, (), [], None))
    names = ["report.json"] if broken else ["report.html", "report.json", "summary.md"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(run.artifacts) == names
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["student"]["heldout_ce_nats"] == 3.375 and run.concluded
    said = [fault["text"] for fault in found["faults"]]
    assert said == (["report: report.html and summary.md were not written: KeyError: 'kl_histogram'"] if broken else [])
