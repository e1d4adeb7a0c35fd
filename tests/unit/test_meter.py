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


def applied(means: Any) -> StepResult:
    return StepResult(means, torch.ones(1), True)


class Busy:
    """The figures of a step that a device has still to work on when they are asked for."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self._clock, self._seconds = clock, seconds

    def tolist(self) -> list[float]:
        self._clock.now += self._seconds
        return [1.0, 1.0, 0.0, 0.0, 0.0]


class Unread:
    """A gradient's norm on a device, and how often it was read."""

    read = 0

    def __float__(self) -> float:
        self.read += 1
        return 2.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    return clock


def test_time_of_the_device_belongs_to_what_it_worked_on(clock: Clock) -> None:
    board, feed = Board(), SimpleNamespace(waited_s=0.0)
    meter = Meter(training(None, steps=3), board, feed)  # type: ignore[arg-type]
    for step in range(3):
        clock.now += 1.0  # until the step is asked for; the device needs three more
        meter.add(step, applied(Busy(clock, 3.0)), None, None, {})
    points = [metrics for _, metrics in board.points if names.LOSS in metrics]
    assert [point[names.INTERVAL_S] for point in points] == [4.0, 4.0, 4.0]
    assert meter.summary()["tokens_per_s"] == TOKENS / 4.0, "of the steps after the first"


def test_figures_stay_on_the_device_until_they_are_posted(clock: Clock) -> None:
    board, feed, norms = Board(), SimpleNamespace(waited_s=0.0), [Unread() for _ in range(4)]
    meter = Meter(training(None, steps=4), board, feed)  # type: ignore[arg-type]
    for step, norm in enumerate(norms):
        clock.now += 0.4
        meter.add(step, applied(torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0])), norm, None, {})
        assert [norm.read for norm in norms] == [1, *[int(step == 3)] * 3], "the first, and later about one a second"
    assert [metrics[names.GRAD_NORM] for _, metrics in board.points if names.LOSS in metrics] == [2.0] * 4


def test_a_checkpoints_stall_is_posted_with_its_steps(clock: Clock) -> None:
    board, feed = Board(), SimpleNamespace(waited_s=0.0)
    meter = Meter(training(None, steps=3), board, feed)  # type: ignore[arg-type]
    for step in range(3):
        clock.now += 2.0
        if step == 1:
            meter.saved(1.5, 0.25)
        meter.add(step, applied(torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0])), None, None, {})
    points = [metrics for _, metrics in board.points if names.LOSS in metrics]
    assert [point.get(names.CHECKPOINT_STALL_S) for point in points] == [None, 0.25, None]
    meter.saved(12.5, 0.0)
    assert board.points[-1][1] == {names.LAST_CHECKPOINT_TIME_S: 12.5}
