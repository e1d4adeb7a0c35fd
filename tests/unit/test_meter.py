"""What a training says of its speed is about training alone, whatever is done in between."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from orchestrator.student import meter as module
from orchestrator.student.meter import Meter
from orchestrator.student.step import StepResult
from orchestrator.tracking import names
from tests.unit.test_length import training

TOKENS = 16 * 64


class Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


class Board:
    """Keeps what is posted."""

    def __init__(self) -> None:
        self.points: list[tuple[int, dict[str, float]]] = []
        self.post = SimpleNamespace(remote=lambda _stage, points: self.points.extend(points))
        self.set_progress = SimpleNamespace(remote=lambda *_: None)


@pytest.mark.parametrize("evaluated", [True, False])
def test_time_of_an_evaluation_is_neither_training_nor_waiting(monkeypatch: pytest.MonkeyPatch, evaluated: bool) -> None:
    clock, board, feed = Clock(), Board(), SimpleNamespace(waited_s=0.0)
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    meter = Meter(training(None, steps=4), board, feed)  # type: ignore[arg-type]
    for step in range(4):
        clock.now, feed.waited_s = clock.now + 2.0, feed.waited_s + 0.5
        heldout: dict[str, Any] = {}
        if evaluated:
            with meter.aside(torch.device("cpu")):
                clock.now += 30.0
            heldout = {names.HELDOUT_CE_NATS: 3.0}
        meter.add(step, StepResult(torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]), torch.ones(1), True), None, None, heldout)
    points = [metrics for _, metrics in board.points if names.LOSS in metrics]
    assert len(points) == 4
    for point in points:
        assert point[names.TRAIN_TOKENS_PER_S] == TOKENS / 2.0
        assert point[names.LABEL_WAIT_FRACTION] == 0.25
        assert point[names.TRAIN_BUSY_S] == 1.5
        assert point.get(names.HELDOUT_CE_NATS) == (3.0 if evaluated else None), "in the point of its step"
    summary = meter.summary()
    assert (summary["tokens_per_s"], summary["label_wait_fraction"]) == (TOKENS / 2.0, 0.25)
    assert (summary["steps"], summary["steps_asked"], summary["rows_seen"], summary["passes"]) == (4, 4, 64, 64 / 36)
